// Many socket.io clients in one process, each with its own x-forwarded-for.
//
//   node clients.js URL TRANSPORTS MESSAGES KEY...
//
// TRANSPORTS: "upgrade" (long polling first, then a WebSocket) or "websocket" (nothing else).
// Each client has MESSAGES texts echoed right after it connected and as many once it is on its
// WebSocket. When all clients are done they stay connected until SIGTERM. At
// SIGUSR2 they all have $LOAD more texts echoed each, at the same time.
//
// Standard output: one JSON object a line.
//   {"event":"client","key","sid","transport","servers":[..],"echoed","errors":[..]}  per client
//   {"event":"settled"}   all clients have reported
//   {"event":"loaded","echoed","errors":[..]}   when those have come back
//   {"event":"closed","lost":[keys]}   all have left; lost are those that were cut off before
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
      // The engine exists from the start; it opens its transport later.
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
const alive = setInterval(() => {}, 60_000); // with all clients cut off nothing else would keep us here
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
