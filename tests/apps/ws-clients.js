// Many thousands of WebSockets in one process, each with its own x-forwarded-for.
//
//   node ws-clients.js URL LOCAL_ADDRESS COUNT PARALLEL NAME
//
// Opens COUNT sockets from LOCAL_ADDRESS, PARALLEL at a time. Then obeys lines of standard input:
//   echo    every socket sends its own text and waits for the echo
//   close   closes all sockets in order, and ends the process
// Standard output: one JSON object on each line.
//   {"event":"open","count","errors":[..]}     after all were tried; errors: the first few
//   {"event":"echoed","count","errors":[..]}   after each `echo`
//   {"event":"closed","count"}                 count: how many were still open
import { createInterface } from "node:readline";
import WebSocket from "ws";

const [url, localAddress, count, parallel, name] = process.argv.slice(2);
const PATIENCE = 120_000; // milliseconds
const say = (record) => console.log(JSON.stringify(record));
const sockets = [];
let round = 0;

const within = (what, start) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`no ${what} within ${PATIENCE} ms`)), PATIENCE);
    start(
      (value) => (clearTimeout(timer), resolve(value)),
      (error) => (clearTimeout(timer), reject(error)),
    );
  });

const open = (index) =>
  within("connection", (resolve, reject) => {
    const headers = { "x-forwarded-for": `${name}-${index}` };
    const socket = new WebSocket(url, { localAddress, headers, perMessageDeflate: false });
    socket.once("open", () => resolve(sockets.push(socket)));
    socket.once("error", reject);
  });

const echo = (socket, index) =>
  within("echo", (resolve, reject) => {
    const text = `${name} ${index} ${round} ${"x".repeat(index % 200)}`;
    const closed = () => reject(new Error("closed"));
    socket.once("close", closed);
    socket.once("message", (data) => {
      socket.off("close", closed);
      if (data.toString() === text) resolve();
      else reject(new Error(`echo differs: ${data.toString().slice(0, 80)}`));
    });
    socket.send(text);
  });

// Runs `work` for 0 to `total` - 1, `limit` at a time. Returns the first errors.
async function all(total, limit, work) {
  const errors = [];
  let next = 0;
  const worker = async () => {
    while (next < total) {
      const index = next++;
      await work(index).catch((error) => errors.length < 5 && errors.push(`${index}: ${error.message}`));
    }
  };
  await Promise.all(Array.from({ length: limit }, worker));
  return errors;
}

const errors = await all(Number(count), Number(parallel), open);
// A later error shows as a failed echo.
sockets.forEach((socket) => socket.on("error", () => {}));
say({ event: "open", count: sockets.length, errors });

for await (const line of createInterface({ input: process.stdin })) {
  if (line === "echo") {
    round += 1;
    let count = 0;
    const errors = await all(sockets.length, 1000, (i) => echo(sockets[i], i).then(() => (count += 1)));
    say({ event: "echoed", count, errors });
  } else if (line === "close") {
    break;
  }
}
const left = sockets.filter((socket) => socket.readyState === WebSocket.OPEN);
const closing = await all(left.length, 1000, (i) =>
  within("close", (resolve) => {
    left[i].once("close", resolve);
    left[i].close();
  }),
);
say({ event: "closed", count: left.length - closing.length });
