//! A live stream as operators see it: the row of `/flows` and of `steer flows --json`.

use std::net::SocketAddr;

use serde::Serialize;

/// What is known of one stream; `null` is what the source of the row cannot tell: a process knows its streams, the kernel's
/// maps know what the kernel does with them.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Of the process that lists the stream.
    pub id: Option<u64>,
    pub client: SocketAddr,
    /// Where the client connected to.
    pub listener: Option<SocketAddr>,
    /// Where Steer connected to the endpoint from.
    pub source: Option<SocketAddr>,
    pub endpoint: SocketAddr,
    pub cluster: Option<String>,
    /// xxh64 of the cluster's name, 16 hex digits, which is all that a record has of the name.
    #[serde(serialize_with = "hex")]
    pub cluster_hash: u64,
    /// 16 hex digits; `null` also if there was no hash key.
    #[serde(serialize_with = "hex_if_any")]
    pub key_hash: Option<u64>,
    pub path: &'static str,
    /// Why not a better path.
    pub reason: Option<&'static str>,
    /// Of the stream's record.
    pub state: Option<&'static str>,
    pub opened_unix_seconds: f64,
    pub age_seconds: f64,
    /// Since the last payload of either direction.
    pub idle_seconds: Option<f64>,
    pub bytes_to_upstream: u64,
    pub bytes_to_downstream: u64,
    /// That the kernel forwarded.
    pub packets_to_upstream: Option<u64>,
    pub packets_to_downstream: Option<u64>,
}

fn hex<S: serde::Serializer>(hash: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{hash:016x}"))
}

fn hex_if_any<S: serde::Serializer>(hash: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    match hash {
        Some(hash) => hex(hash, serializer),
        None => serializer.serialize_none(),
    }
}
