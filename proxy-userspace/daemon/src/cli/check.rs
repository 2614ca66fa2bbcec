//! `steer check`: reads a configuration as `steer run` does, and prints how Steer understands it.
//! Binds no port and needs no privileges.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;
use steer_policy::config::{
    self, Cluster, Config, Format, HashFunction, LbPolicy, Listener, LoadError, SpliceMode,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration: native YAML, Envoy v3 bootstrap or Envoy v1 JSON
    file: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let loaded = config::read(&args.file);
    if args.json {
        println!("{}", as_json(&loaded));
    } else {
        match &loaded {
            Ok(loaded) => print(args, loaded.format, &loaded.config),
            Err(error) => eprintln!("{error}"),
        }
    }
    if loaded.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(args: &Args, format: Format, config: &Config) {
    let file = args.file.display();
    println!("{file}: good, in {format} format");
    for listener in &config.listeners {
        println!("  {}", describe_listener(listener));
    }
    for cluster in &config.clusters {
        println!("  {}", describe_cluster(cluster));
    }
    println!("  upgraded streams: {}", describe_splice(config));
    match config.admin {
        Some(address) => println!("  admin on http://{address}"),
        None => println!("  no admin server"),
    }
    print_warnings(&file.to_string(), config);
    println!("next: steer run -c {file}");
}

/// Prints the warnings of a configuration to stderr.
pub(super) fn print_warnings(file: &str, config: &Config) {
    for warning in &config.warnings {
        eprintln!("{file}:{}:{}: warning: {}", warning.line, warning.column, warning.text);
    }
}

fn describe_listener(listener: &Listener) -> String {
    let routes: Vec<_> = listener.virtual_hosts.iter().flat_map(|host| &host.routes).collect();
    let allowed = listener.options.upgrade_websocket;
    let upgrades = routes.iter().filter(|route| route.upgrade_websocket.unwrap_or(allowed)).count();
    format!(
        "listener {} on {}: {}, {}, websocket on {upgrades}",
        listener.name,
        listener.address,
        count(listener.virtual_hosts.len(), "virtual host"),
        count(routes.len(), "route"),
    )
}

fn describe_cluster(cluster: &Cluster) -> String {
    let balancing = match cluster.lb_policy {
        LbPolicy::RingHash { hash_function, minimum_ring_size, maximum_ring_size } => format!(
            "ring_hash ({}), at least {minimum_ring_size} and at most {maximum_ring_size} points",
            hash_name(hash_function)
        ),
        LbPolicy::Maglev { table_size } => format!("maglev, {table_size} slots"),
    };
    format!("cluster {}: {}, {balancing}", cluster.name, count(cluster.endpoints.len(), "endpoint"))
}

fn describe_splice(config: &Config) -> String {
    let packet = || format!("packet splice for up to {}", config.packet_splice.max_streams);
    match config.splice {
        SpliceMode::Auto => format!("{}, else relay", packet()),
        SpliceMode::Packet => format!("{}, no start without it", packet()),
        SpliceMode::Sockmap => "socket splice, else relay".to_owned(),
        SpliceMode::Relay => "relay".to_owned(),
    }
}

fn hash_name(function: HashFunction) -> &'static str {
    match function {
        HashFunction::XxHash => "xx_hash",
        HashFunction::MurmurHash2 => "murmur_hash_2",
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn as_json(loaded: &Result<config::Loaded, LoadError>) -> serde_json::Value {
    match loaded {
        Ok(config::Loaded { format, config }) => json!({
            "good": true,
            "format": format.to_string(),
            "listeners": config.listeners.iter().map(|listener| json!({
                "name": listener.name,
                "address": listener.address,
                "routes": listener.virtual_hosts.iter().map(|host| host.routes.len()).sum::<usize>(),
            })).collect::<Vec<_>>(),
            "clusters": config.clusters.iter().map(|cluster| json!({
                "name": cluster.name,
                "lb_policy": match cluster.lb_policy {
                    LbPolicy::RingHash { .. } => "ring_hash",
                    LbPolicy::Maglev { .. } => "maglev",
                },
                "endpoints": cluster.endpoints.iter().map(|endpoint| endpoint.address).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
            "splice": config.splice.as_str(),
            "admin": config.admin,
            "warnings": config.warnings.iter().map(|warning| json!({
                "line": warning.line, "column": warning.column, "text": warning.text,
            })).collect::<Vec<_>>(),
        }),
        Err(LoadError::Invalid { problems, .. }) => json!({
            "good": false,
            "problems": problems.iter().map(|problem| json!({
                "line": problem.line, "column": problem.column, "message": problem.message, "hint": problem.hint,
            })).collect::<Vec<_>>(),
        }),
        Err(error @ LoadError::Read { .. }) => json!({
            "good": false,
            "problems": [{ "line": 0, "column": 0, "message": error.to_string(), "hint": null }],
        }),
    }
}
