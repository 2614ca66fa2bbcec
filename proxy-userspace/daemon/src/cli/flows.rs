//! `steer flows`: the streams that the kernel carries, read from its maps. Works whatever state the
//! daemon is in.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use proxy_common::flow::state;
use serde_json::json;
use steer_kernel::bpf::packet::cluster::name_hash;
use steer_kernel::bpf::packet::inspect::{self, Found, Stream};
use steer_kernel::tcp::clock;
use steer_policy::config;

use super::coverage;
use super::table::table;
use crate::streams::{self, Row};

/// Show the streams that the kernel carries, from its maps (needs root)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print a JSON array instead of tables: one object for each Steer; with --summary, one object for
    /// each cluster
    #[arg(long)]
    json: bool,
    /// Ask a running Steer how many of its streams the kernel carries, and why not all
    #[arg(long)]
    summary: bool,
    /// The admin listener of that Steer [default: the one of the configuration, or 127.0.0.1:9901]
    #[arg(long, value_name = "ADDRESS:PORT", requires = "summary")]
    admin: Option<SocketAddr>,
    /// The configuration, to show clusters by their names
    #[arg(short, long, value_name = "FILE", env = "STEER_CONFIG")]
    config: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let config = args.config.as_ref().map(|file| config::load(file)).transpose()?;
    if args.summary {
        let configured = config.and_then(|config| config.admin);
        return coverage::run(args.admin.or(configured).unwrap_or(config::DEFAULT_ADMIN), args.json);
    }
    let clusters = config.map_or_else(Clusters::default, |config| {
        Clusters(
            config.clusters.into_iter().map(|cluster| (name_hash(&cluster.name), cluster.name)).collect(),
        )
    });
    let found = inspect::running(clock::monotonic_ns()).context("cannot look into the kernel")?;
    let now = SystemTime::now();
    if args.json {
        let objects: Vec<_> = found.iter().map(|found| as_json(found, &clusters, now)).collect();
        println!("{}", serde_json::Value::from(objects));
    } else {
        print!("{}", report(&found, &clusters, now));
    }
    Ok(())
}

/// The names of clusters, by the hash that a record has.
#[derive(Default)]
struct Clusters(HashMap<u64, String>);

impl Clusters {
    fn name(&self, hash: u64) -> Option<&str> {
        self.0.get(&hash).map(String::as_str)
    }
}

fn report(found: &[Found], clusters: &Clusters, now: SystemTime) -> String {
    let mut text = String::new();
    for Found { map, limit, streams } in found {
        match streams {
            Some(streams) => {
                text += &format!("map {map}: {} of {limit} streams\n", streams.len());
                text += &table_of(streams, clusters, now);
            }
            None => {
                text += &format!("map {map}: of another version of Steer; use its own `steer flows`\n");
            }
        }
    }
    text += match found {
        [] => {
            "no Steer on this host splices packets\n\
             next: `steer run --splice packet` says what is missing for it; relayed streams are in /flows of the \
             admin listener\n"
        }
        _ => {
            "next: `steer flows --json` has every field; `steer flows --summary` counts relayed streams, too\n"
        }
    };
    text
}

const HEADINGS: [&str; 8] =
    ["CLIENT", "ENDPOINT", "CLUSTER", "STATE", "AGE", "TO UPSTREAM", "TO DOWNSTREAM", "IDLE"];

/// Empty if there are no streams.
fn table_of(streams: &[Stream], clusters: &Clusters, now: SystemTime) -> String {
    if streams.is_empty() {
        return String::new();
    }
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(streams.iter().map(|stream| row(stream, clusters, now)));
    table(&rows)
}

fn row(stream: &Stream, clusters: &Clusters, now: SystemTime) -> [String; 8] {
    let cluster = clusters.name(stream.cluster);
    [
        stream.client.to_string(),
        stream.endpoint.to_string(),
        cluster.map_or_else(|| format!("{:016x}", stream.cluster), str::to_owned),
        state_name(stream.state).to_owned(),
        show_time(age(stream, now)),
        show_bytes(stream.bytes[0]),
        show_bytes(stream.bytes[1]),
        show_time(stream.idle),
    ]
}

fn as_json(found: &Found, clusters: &Clusters, now: SystemTime) -> serde_json::Value {
    let rows = found
        .streams
        .as_ref()
        .map(|streams| streams.iter().map(|stream| full_row(stream, clusters, now)).collect::<Vec<_>>());
    json!({ "map": found.map, "limit": found.limit, "streams": rows })
}

fn full_row(stream: &Stream, clusters: &Clusters, now: SystemTime) -> Row {
    Row {
        id: None,
        client: stream.client,
        listener: Some(stream.listener),
        source: Some(stream.source),
        endpoint: stream.endpoint,
        cluster: clusters.name(stream.cluster).map(str::to_owned),
        cluster_hash: stream.cluster,
        key_hash: stream.key_hash,
        path: streams::Path::Packet.into_str(),
        reason: None,
        state: Some(state_name(stream.state)),
        opened_unix_seconds: Duration::from_millis(stream.opened_unix_ms).as_secs_f64(),
        age_seconds: age(stream, now).as_secs_f64(),
        idle_seconds: Some(stream.idle.as_secs_f64()),
        bytes_to_upstream: stream.bytes[0],
        bytes_to_downstream: stream.bytes[1],
        packets_to_upstream: Some(stream.packets[0]),
        packets_to_downstream: Some(stream.packets[1]),
    }
}

fn state_name(state: u32) -> &'static str {
    match state {
        state::HAND_OVER => "hand_over",
        state::SPLICED => "spliced",
        state::FINISHED => "finished",
        state::RESET => "reset",
        state::DEAD => "dead",
        _ => "unknown",
    }
}

fn age(stream: &Stream, now: SystemTime) -> Duration {
    let opened = SystemTime::UNIX_EPOCH + Duration::from_millis(stream.opened_unix_ms);
    // The clock may have been set back.
    now.duration_since(opened).unwrap_or_default()
}

/// A time in its two largest units.
fn show_time(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        seconds @ 3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        seconds => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64 / 1024.0;
    if value < 1.0 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream {
            client: "192.0.2.1:50000".parse().unwrap(),
            listener: "192.0.2.2:80".parse().unwrap(),
            source: "10.0.0.2:20000".parse().unwrap(),
            endpoint: "10.0.0.1:3000".parse().unwrap(),
            state: state::SPLICED,
            cluster: name_hash("sio"),
            key_hash: Some(7),
            opened_unix_ms: 1_000_000,
            bytes: [999, 5 << 20],
            packets: [3, 4],
            idle: Duration::from_secs(61),
        }
    }

    fn text(found: &[Found], clusters: &Clusters) -> String {
        report(found, clusters, SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + 3660))
    }

    #[test]
    fn streams_stand_in_a_table() {
        let clusters = Clusters(HashMap::from([(name_hash("sio"), "sio".to_owned())]));
        let found = [
            Found { map: 7, limit: 65536, streams: Some(vec![stream()]) },
            Found { map: 9, limit: 4, streams: Some(vec![]) },
            Found { map: 11, limit: 4, streams: None },
        ];
        let expected = "\
map 7: 1 of 65536 streams
CLIENT           ENDPOINT       CLUSTER  STATE    AGE    TO UPSTREAM  TO DOWNSTREAM  IDLE
192.0.2.1:50000  10.0.0.1:3000  sio      spliced  1h01m  999 B        5.0 MiB        1m01s
map 9: 0 of 4 streams
map 11: of another version of Steer; use its own `steer flows`
next: `steer flows --json` has every field; `steer flows --summary` counts relayed streams, too
";
        assert_eq!(text(&found, &clusters), expected);
        assert!(text(&found, &Clusters::default()).contains(&format!("{:016x}", name_hash("sio"))));
    }

    #[test]
    fn without_a_packet_splice_the_report_says_what_to_do() {
        let text = text(&[], &Clusters::default());
        assert!(text.contains("no Steer on this host splices packets"), "{text}");
        assert!(text.contains("next: `steer run --splice packet`"), "{text}");
    }

    #[test]
    fn json_has_names_and_numbers() {
        let clusters = Clusters(HashMap::from([(name_hash("sio"), "sio".to_owned())]));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1060);
        let value = as_json(&Found { map: 7, limit: 8, streams: Some(vec![stream()]) }, &clusters, now);
        assert_eq!(value["streams"][0]["cluster"], "sio");
        assert_eq!(value["streams"][0]["key_hash"], "0000000000000007");
        assert_eq!(value["streams"][0]["bytes_to_downstream"], 5 << 20);
        assert_eq!(value["streams"][0]["cluster_hash"], format!("{:016x}", name_hash("sio")));
        assert_eq!(value["streams"][0]["age_seconds"], 60.0);
        assert_eq!(value["streams"][0]["path"], "packet");
        assert!(as_json(&Found { map: 7, limit: 8, streams: None }, &clusters, now)["streams"].is_null());
    }

    #[test]
    fn sizes_and_times_are_short() {
        let sizes = [0, 1023, 1024, 1536 << 10, u64::MAX].map(show_bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "16384.0 PiB"]);
        let times = [59, 60, 3599, 86399, 90000].map(|seconds| show_time(Duration::from_secs(seconds)));
        assert_eq!(times, ["59s", "1m00s", "59m59s", "23h59m", "1d01h"]);
    }
}
