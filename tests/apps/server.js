// A socket.io 4 server that answers with its name and reports every request.
//
//   node server.js NAME ADDRESS PORT
//
// Standard output: one JSON object on each line.
//   {"event":"listening","server"}
//   {"event":"request","server","kind":"poll"|"upgrade","key","sid","method","status"}  an HTTP
//       request, after its answer (an upgrade: on arrival, with status 101); key is the request's
//       x-forwarded-for, sid the session that the request names (null: a new session)
//   {"event":"refused","server","key","sid","reason"}   a request that socket.io itself refused, for example
//       "Session ID unknown"
import { createServer } from "node:http";
import { Server } from "socket.io";

const [name, address, port] = process.argv.slice(2);
const say = (record) => console.log(JSON.stringify({ ...record, server: name }));

const about = (request) => ({
  key: request.headers["x-forwarded-for"] ?? null,
  sid: new URL(request.url, "http://localhost").searchParams.get("sid"),
  method: request.method,
});

const http = createServer((_request, response) => response.writeHead(404).end());
const io = new Server(http, { serveClient: false });
io.engine.on("headers", (headers) => (headers["x-served-by"] = name));
io.engine.on("connection_error", ({ req, message }) => {
  const { key, sid } = about(req);
  say({ event: "refused", key, sid, reason: message });
});
io.on("connection", (socket) => {
  socket.on("echo", (text, answer) => answer({ server: name, text }));
});

// Registered before socket.io's own listeners, so that no request is missed.
http.prependListener("request", (request, response) => {
  const record = { event: "request", kind: "poll", ...about(request) };
  response.once("close", () => say({ ...record, status: response.statusCode }));
});
http.prependListener("upgrade", (request) => {
  say({ event: "request", kind: "upgrade", ...about(request), status: 101 });
});

http.listen(Number(port), address, () => say({ event: "listening" }));
