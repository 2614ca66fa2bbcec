// A WebSocket server that sends every message back.
//
//   node ws-server.js ADDRESS PORT
//
// Standard output: {"event":"listening"} when it is ready.
import { WebSocketServer } from "ws";

const [host, port] = process.argv.slice(2);
const server = new WebSocketServer({ host, port: Number(port), backlog: 4096 });
server.on("listening", () => console.log(JSON.stringify({ event: "listening" })));
server.on("connection", (socket) => {
  socket.on("message", (data, isBinary) => socket.send(data, { binary: isBinary }));
  // Some tests cut clients off, which is an error here.
  socket.on("error", () => {});
});
