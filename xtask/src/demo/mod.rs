//! `cargo xtask demo`: three real socket.io servers, Steer in front of them, real clients before
//! it, each in network namespaces of its own; then what happened, from the servers' own records.

mod load;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use steer_tests::process::{Orphan, Process};
use steer_tests::require::is_root;
use steer_tests::socketio::{self, events, text, wait_for};
use steer_tests::steer::{Steer, route};
use steer_tests::topology::Topology;
use steer_tests::{netns, peers};

use crate::exec::{step, target};
use crate::setup;

/// Begins the names of the demo's namespaces.
const PREFIX: &str = "steer-demo";
const SERVERS: [&str; 3] = ["alpha", "beta", "gamma"];
const SERVER_PORT: u16 = 3000;
const LISTEN_PORT: u16 = 8080;
/// Texts that each client has echoed before its upgrade, and again after it.
const MESSAGES: u64 = 5;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Leave everything running, and say what to try
    #[arg(long, conflicts_with = "stop")]
    keep: bool,
    /// Stop what `--keep` left running
    #[arg(long)]
    stop: bool,
    /// How Steer carries the WebSockets
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = ["auto", "packet", "sockmap", "relay"])]
    splice: String,
}

/// How a group of clients connects, in `clients.js`' word and in ours, and their keys.
const GROUPS: [(&str, &str, &[&str]); 2] = [
    (
        "upgrade",
        "long polling first, then an upgrade to WebSocket",
        &["203.0.113.10", "203.0.113.11", "203.0.113.12", "198.51.100.7", "2001:db8::5"],
    ),
    ("websocket", "WebSocket from the start", &["203.0.113.20", "203.0.113.21", "198.51.100.99"]),
];

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    anyhow::ensure!(
        is_root(),
        "the demo makes network namespaces and loads BPF programs, which needs root. Run:\n  \
         sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask demo"
    );
    if options.stop {
        return stop();
    }
    let binary = setup::steer(setup::Build::Quick)?;
    setup::socketio()?;
    for name in netns::remove_leftovers(PREFIX)? {
        println!("    removed what an earlier demo had left: {name}");
    }
    let good = show(&binary, &options.splice, options.keep)?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn stop() -> Result<ExitCode> {
    let removed = netns::remove_leftovers(PREFIX)?;
    if removed.is_empty() {
        println!("No demo is running.");
    }
    removed.iter().for_each(|name| println!("removed {name} and what ran in it"));
    Ok(ExitCode::SUCCESS)
}

/// Returns whether everything went as expected.
fn show(binary: &Path, splice: &str, keep: bool) -> Result<bool> {
    let directory = target().join("demo");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let mut topology = Topology::with_prefix(PREFIX, SERVERS.len() as u8)?;
    let orphan = if keep { Orphan::Lives } else { Orphan::Dies };
    let mut stage = Stage::set(binary, &directory, &topology, splice, orphan)?;

    step("What happened");
    let rows = stage.rows(binary, &topology)?;
    print_table(&rows);
    let mut good = rows.iter().all(Row::is_good);
    step(&format!("The clients talk on: {} texts each", load::MESSAGES));
    let load = load::show(&stage.steer, &topology, &stage.clients)?;
    good &= load.good && (load.spliced || splice != "packet");
    if splice == "auto" && !load.spliced {
        println!(
            "    Not spliced by packets: `reason` in /flows and steer's log ({}) say why.",
            directory.display()
        );
    }
    if keep {
        stage.keep();
    } else {
        good &= stage.clients_leave()?;
    }
    println!("\n{}", if good { CONCLUSION } else { "FAILED: look at the rows marked with !" });
    if good && load.spliced {
        println!("{SPLICED}");
    }
    if keep {
        print_what_to_try(&stage, &topology, binary);
        drop(stage);
        topology.keep();
    } else if good {
        println!(
            "\nNext: `cargo xtask demo --keep` leaves it all running, `--splice relay` shows what copying takes, \
             `cargo xtask test` runs every test."
        );
    }
    Ok(good)
}

const CONCLUSION: &str = "Shown: every HTTP poll and the WebSocket of each client reached the one server that \
                          Envoy's ring names for its key, and every message came back.";

const SPLICED: &str = "Shown: the kernel forwards the WebSockets' packets; Steer has no socket for them, and their texts take \
                       none of its processor time.";

/// Everything that runs. Dropped in this order: clients before servers.
struct Stage<'n> {
    clients: Vec<Process>,
    steer: Steer<'n>,
    servers: Vec<Process>,
}

impl<'n> Stage<'n> {
    fn set(
        binary: &Path,
        directory: &Path,
        topology: &'n Topology,
        splice: &str,
        orphan: Orphan,
    ) -> Result<Self> {
        step("Three socket.io servers");
        let mut servers = Vec::new();
        let addresses = topology.endpoint_addresses(SERVER_PORT);
        for ((name, netns), address) in SERVERS.iter().zip(&topology.endpoints).zip(&addresses) {
            let command = node("server.js", &[name, &address.ip().to_string(), &address.port().to_string()])?;
            servers.push(Process::start(name, command, directory, Some(netns), orphan)?);
            println!("    {name:<6} {address}  (namespace {})", netns.name());
        }
        for server in &mut servers {
            wait_for("listening", server)?;
        }

        step("steer");
        let config = socketio::config(SocketAddr::from((Topology::PROXY, LISTEN_PORT)), &addresses);
        let steer = Steer::start_at(
            binary,
            directory,
            &config,
            Some(&topology.proxy),
            &["--splice", splice],
            orphan,
        )?;
        let (file, namespace) = (steer.config().display(), topology.proxy.name());
        println!("    steer run -c {file} --splice {splice}  (namespace {namespace})");
        config.lines().for_each(|line| println!("    | {line}"));

        step("Clients");
        let mut clients = Vec::new();
        for (transports, what, keys) in GROUPS {
            let name = format!("clients-{transports}");
            let mut command =
                node("clients.js", &[&[&url(), transports, &MESSAGES.to_string()], keys].concat())?;
            command.env("LOAD", load::MESSAGES.to_string());
            clients.push(Process::start(&name, command, directory, Some(&topology.clients), orphan)?);
            println!("    {} x {what}", keys.len());
        }
        for group in &mut clients {
            wait_for("settled", group)?;
        }
        Ok(Self { clients, steer, servers })
    }

    /// One row for each client, put together from what the clients, the servers, `/flows` and
    /// `steer route` say.
    fn rows(&self, binary: &Path, topology: &Topology) -> Result<Vec<Row>> {
        let keys: Vec<_> = GROUPS
            .iter()
            .flat_map(|(transports, _, keys)| keys.iter().map(move |key| (*transports, *key)))
            .collect();
        let requests: Vec<_> = keys.iter().map(|(_, key)| request(key)).collect();
        let choices = route(binary, self.steer.config(), &requests)?;
        let flows = self.steer.flows()?;
        let addresses = topology.endpoint_addresses(SERVER_PORT);
        let names: BTreeMap<_, _> = addresses.iter().map(ToString::to_string).zip(SERVERS).collect();
        let reports = all_events(&self.clients, "client")?;
        let records = all_events(&self.servers, "request")?;

        let row = |((transports, key), choice): (&(&'static str, &'static str), &Value)| {
            let report = reports.iter().find(|report| report["key"] == *key).unwrap_or(&Value::Null);
            let answered_by = |kind: &str| {
                let mine = records.iter().filter(|record| record["key"] == *key && record["kind"] == kind);
                mine.map(|record| text(&record["server"])).collect::<Vec<_>>()
            };
            let paths =
                flows.iter().filter(|flow| !flow["key_hash"].is_null() && flow["key_hash"] == choice["hash"]);
            Row {
                key,
                transports,
                hash: text(&choice["hash"]),
                ring: choice["endpoint"]
                    .as_str()
                    .and_then(|endpoint| names.get(endpoint))
                    .map_or_else(String::new, ToString::to_string),
                polls: answered_by("poll"),
                websockets: answered_by("upgrade"),
                paths: paths.map(|flow| text(&flow["path"])).collect(),
                echoed: report["echoed"].as_u64().unwrap_or(0),
                errors: report["errors"]
                    .as_array()
                    .map_or_else(|| vec!["no report".to_owned()], |errors| errors.iter().map(text).collect()),
            }
        };
        Ok(keys.iter().zip(&choices).map(row).collect())
    }

    /// Ends the clients in an orderly way; returns whether all were still connected.
    fn clients_leave(&mut self) -> Result<bool> {
        for group in &mut self.clients {
            group.signal(libc::SIGTERM)?;
            group.wait(PATIENCE)?;
        }
        let closed = all_events(&self.clients, "closed")?;
        let lost: Vec<_> = closed.iter().filter_map(|event| event["lost"].as_array()).flatten().collect();
        lost.iter().for_each(|key| println!("  ! {key} was cut off before it left"));
        Ok(closed.len() == self.clients.len() && lost.is_empty())
    }

    fn keep(&mut self) {
        self.clients.iter_mut().chain(&mut self.servers).for_each(Process::keep);
        self.steer.process().keep();
    }
}

/// One client and its fate.
struct Row {
    key: &'static str,
    transports: &'static str,
    hash: String,
    /// The server that the ring names.
    ring: String,
    /// The server that answered, for each request.
    polls: Vec<String>,
    websockets: Vec<String>,
    /// Of the client's streams.
    paths: Vec<String>,
    echoed: u64,
    errors: Vec<String>,
}

impl Row {
    fn is_good(&self) -> bool {
        let polled =
            if self.transports == "upgrade" { !self.polls.is_empty() } else { self.polls.is_empty() };
        polled
            && !self.ring.is_empty()
            && self.polls.iter().chain(&self.websockets).all(|server| *server == self.ring)
            && self.websockets.len() == 1
            && self.paths.len() == 1
            && self.echoed == 2 * MESSAGES
            && self.errors.is_empty()
    }
}

fn print_table(rows: &[Row]) {
    let header = [
        "client (x-forwarded-for)",
        "transport",
        "key hash",
        "ring says",
        "polls answered by",
        "websocket",
        "carried by",
        "echoed",
    ];
    let mut table = vec![header.map(str::to_owned)];
    table.extend(rows.iter().map(|row| {
        let transport = if row.transports == "upgrade" { "polling+websocket" } else { "websocket" };
        [
            row.key.to_owned(),
            transport.to_owned(),
            row.hash.clone(),
            row.ring.clone(),
            counted(&row.polls),
            counted(&row.websockets),
            counted(&row.paths),
            format!("{}/{}", row.echoed, 2 * MESSAGES),
        ]
    }));
    let width = |column: usize| table.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..header.len()).map(width).collect();
    for (i, line) in table.iter().enumerate() {
        let bad = i > 0 && !rows[i - 1].is_good();
        let cells: Vec<_> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("  {} {}", if bad { "!" } else { " " }, cells.join("  ").trim_end());
    }
    for row in rows.iter().filter(|row| !row.errors.is_empty()) {
        println!("  ! {}: {}", row.key, row.errors.join("; "));
    }
}

/// `alpha x3, beta x1`
fn counted(servers: &[String]) -> String {
    let mut counts = BTreeMap::new();
    servers.iter().for_each(|server| *counts.entry(server).or_insert(0) += 1);
    match counts.len() {
        0 => "-".to_owned(),
        1 if servers.len() == 1 => servers[0].clone(),
        _ => counts.iter().map(|(server, n)| format!("{server} x{n}")).collect::<Vec<_>>().join(", "),
    }
}

fn print_what_to_try(stage: &Stage<'_>, topology: &Topology, binary: &Path) {
    let inside = format!("ip netns exec {}", topology.proxy.name());
    let admin = stage.steer.admin();
    let pids: Vec<_> =
        stage.clients.iter().chain(&stage.servers).map(Process::pid).chain([stage.steer.pid()]).collect();
    println!("\nStill running (processes {pids:?}). Try:");
    println!("  {} flows -c {}", binary.display(), stage.steer.config().display());
    println!("  {inside} curl -s http://{admin}/flows");
    println!("  {inside} curl -s http://{admin}/metrics");
    println!(
        "  {} route -c {} --header 'x-forwarded-for: 192.0.2.1'",
        binary.display(),
        stage.steer.config().display()
    );
    println!(
        "  ip netns exec {} curl -si -H 'x-forwarded-for: 192.0.2.1' '{}{HANDSHAKE}'",
        topology.clients.name(),
        url()
    );
    println!("To stop it: cargo xtask demo --stop");
}

/// The first request of a polling client.
const HANDSHAKE: &str = "/socket.io/?EIO=4&transport=polling";

fn url() -> String {
    format!("http://{}:{LISTEN_PORT}", Topology::PROXY)
}

/// A client's first poll, as `steer route --batch` wants it.
fn request(key: &str) -> Value {
    let host = format!("{}:{LISTEN_PORT}", Topology::PROXY);
    json!({ "host": host, "path": HANDSHAKE, "method": "GET", "headers": [["x-forwarded-for", key]] })
}

fn node(script: &str, args: &[&str]) -> Result<Command> {
    let mut command = peers::node_app(script).context("the packages of tests/apps are gone")?;
    command.args(args);
    Ok(command)
}

/// The events of this kind in what these programs have said.
fn all_events(programs: &[Process], kind: &str) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for program in programs {
        all.extend(events(&program.stdout()?, kind)?);
    }
    Ok(all)
}
