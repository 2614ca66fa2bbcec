// Many socket.io clients in one process, each with its own x-forwarded-for.
//
//   node clients.js URL TRANSPORTS MESSAGES KEY...
//
// TRANSPORTS: "upgrade" (long polling first, then a WebSocket) or "websocket" (nothing else).
// Each client sends MESSAGES texts for an echo right after it has connected, and as many again once
// it uses its WebSocket. Then all clients stay connected until SIGTERM. At SIGUSR2 each client sends
// $LOAD more texts for an echo, all clients at the same time.
//
// Standard output: one JSON object on each line.
//   {"event":"client","key","sid","transport","servers":[..],"echoed","errors":[..]}  per client
//   {"event":"settled"}   after all clients have reported
//   {"event":"loaded","echoed","errors":[..]}   after the $LOAD texts have come back
//   {"event":"closed","lost":[keys]}   after all have closed; lost: those that were cut off before
import { io } from "socket.io-client";

const [url, transports, messages, ...keys] = process.argv.slice(2);
const PATIENCE = 20_000; // milliseconds
const say = (record) => console.log(JSON.stringify(record));

const within = (promise, what) => {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no ${what} within ${PATIENCE} ms`)), PATIENCE);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
};

const connect = (key) =>
  io(url, {
    extraHeaders: { "x-forwarded-for": key },
    forceNew: true,
    reconnection: false,
    transports: transports === "upgrade" ? ["polling", "websocket"] : ["websocket"],
  });

async function echo(socket, report, phase, count = Number(messages)) {
  for (let i = 0; i < count; i++) {
    const text = `${report.key} ${phase} ${i} ${"x".repeat((i * 997) % 5000)}`;
    const answer = await within(socket.emitWithAck("echo", text), `echo ${i} ${phase}`);
    report.servers.add(answer.server);
    if (answer.text !== text) throw new Error(`echo ${i} ${phase} differs`);
    report.echoed += 1;
  }
}

async function converse(key) {
  const report = { event: "client", key, sid: null, transport: null, servers: new Set(), echoed: 0, errors: [] };
  const socket = connect(key);
  try {
    const upgraded = new Promise((resolve) => {
      // The engine exists from the start. Its transport is opened later.
      if (transports === "upgrade") socket.io.engine.once("upgrade", resolve);
      else resolve();
    });
    await within(
      new Promise((resolve, reject) => {
        socket.once("connect", resolve);
        socket.once("connect_error", (error) =>
          reject(new Error(`${error.message} ${error.context?.responseText ?? error.description?.message ?? ""}`)),
        );
      }),
      "connection",
    );
    report.sid = socket.io.engine.id;
    await echo(socket, report, "first");
    await within(upgraded, "upgrade");
    await echo(socket, report, "upgraded");
    report.transport = socket.io.engine.transport.name;
  } catch (error) {
    report.errors.push(error.message.trim());
  }
  say({ ...report, servers: [...report.servers] });
  return socket;
}

const stopped = new Promise((resolve) => process.once("SIGTERM", resolve));
const alive = setInterval(() => {}, 60_000); // keeps the process alive even if all clients are cut off
const sockets = await Promise.all(keys.map(converse));
process.on("SIGUSR2", async () => {
  const report = { key: "load", servers: new Set(), echoed: 0 };
  const echoes = sockets.map((socket) => echo(socket, report, "loaded", Number(process.env.LOAD)));
  const failed = (await Promise.allSettled(echoes)).filter(({ status }) => status === "rejected");
  say({ event: "loaded", echoed: report.echoed, errors: failed.map(({ reason }) => reason.message) });
});
say({ event: "settled" });
await stopped;
clearInterval(alive);
const lost = keys.filter((_, i) => !sockets[i].connected);
sockets.forEach((socket) => socket.disconnect());
say({ event: "closed", lost });
