//! Rings, tables, health, membership: which endpoint is chosen for a key.

use serde_json::{Value, json};
use steer::upstream::{Snapshot, Table};
use steer_policy::affinity::xxh64;

use crate::fixture::{Bootstrap, Comparison, by_header, clusters, list, picks, route, section, text};

/// A request for the route of a cluster, with `key` as its x-forwarded-for.
fn request(cluster: &str, key: &Value) -> Value {
    json!({ "host": "t", "path": format!("/{cluster}/"), "headers": [["X-Forwarded-For", key]] })
}

fn to_cluster(name: &str) -> Value {
    route(&format!("/{name}/"), name, &by_header("x-forwarded-for"))
}

#[test]
fn every_key_of_every_cluster_is_picked_alike() {
    let cases = section("lb");
    let keysets = section("keysets");
    let mut bootstrap = Bootstrap::new();
    let (mut routes, mut requests, mut expected) = (vec![], vec![], vec![]);
    for case in list(&cases) {
        let (id, hosts) = (text(&case["id"]), list(&case["hosts"]));
        bootstrap = bootstrap.cluster(id, case, hosts);
        routes.push(to_cluster(id));
        let mut add = |key: &Value, endpoint: Value, error: Value| {
            requests.push(request(id, key));
            expected.push((endpoint, error));
        };
        if case.get("status").is_some() {
            assert_eq!(case["status"], json!([503]));
            for key in list(&keysets["k0"]) {
                add(key, Value::Null, "no healthy upstream".into());
            }
            continue;
        }
        let keys = list(&keysets[text(&case["keys"])]);
        let edge = case.get("edge");
        let edge_keys = edge.map_or(&[][..], |edge| list(&edge["keys"]));
        let mut picked = picks(&case["picked"]);
        picked.extend(edge.map(|edge| picks(&edge["picked"])).unwrap_or_default());
        assert_eq!(picked.len(), keys.len() + edge_keys.len());
        for (key, index) in keys.iter().chain(edge_keys).zip(picked) {
            add(key, hosts[index]["address"].clone(), Value::Null);
        }
    }
    let config = bootstrap.listener("lb", &routes, &json!({})).write();

    let mut comparison = Comparison::default();
    for ((answer, (endpoint, error)), request) in
        config.ask(&requests, &[]).iter().zip(&expected).zip(&requests)
    {
        comparison.equal(|| request.to_string(), (&answer["endpoint"], &answer["error"]), (endpoint, error));
    }
    comparison.finish(70_872);
}

#[test]
fn every_table_is_the_same() {
    let cases = section("lb");
    let mut bootstrap = Bootstrap::new();
    for case in list(&cases) {
        bootstrap = bootstrap.cluster(text(&case["id"]), case, list(&case["hosts"]));
    }
    let listener = [to_cluster(text(&cases[0]["id"]))];
    let config = bootstrap.listener("lb", &listener, &json!({})).write().load();
    let clusters = clusters(&config);

    let mut comparison = Comparison::default();
    for case in list(&cases) {
        let id = text(&case["id"]);
        let snapshot = clusters.get(id).unwrap().snapshot();
        if let Some(table) = case.get("table") {
            let (entries, digest) = digest(&snapshot);
            comparison.equal(
                || format!("{id} table"),
                (json!(entries), json!(format!("{digest:016x}"))),
                (table["entries"].clone(), table["xxh64"].clone()),
            );
        }
        if let Some(stats) = case.get("stats") {
            let Table::Ring(ring) = snapshot.table() else { panic!("{id} is not a ring") };
            let sizes = ring.sizes();
            let sizes =
                json!({ "size": sizes.size, "min": sizes.min_per_member, "max": sizes.max_per_member });
            comparison.equal(|| format!("{id} stats"), &sizes, stats);
        }
    }
    // Counts tables and gauges. The vectors have no table for one host and no empty table.
    comparison.finish(226 + 157);
}

/// The number of entries and their hash, as the README of the vectors describes them.
fn digest(snapshot: &Snapshot) -> (usize, u64) {
    let host = |index: u32| u16::try_from(index).unwrap().to_le_bytes();
    let mut bytes = Vec::new();
    match snapshot.table() {
        Table::Ring(ring) => {
            for (hash, owner) in ring.points() {
                bytes.extend_from_slice(&hash.to_le_bytes());
                bytes.extend_from_slice(&host(owner));
            }
            (ring.points().len(), xxh64(&bytes))
        }
        Table::Maglev(maglev) => {
            bytes.extend(maglev.slots().iter().flat_map(|&owner| host(owner)));
            (maglev.slots().len(), xxh64(&bytes))
        }
    }
}

/// Checks each step twice: as a new config, and as an update of the clusters of the step before.
#[test]
fn membership_changes_are_fresh_clusters() {
    let eds = section("eds");
    let keys = list(&eds["keys"]);
    let definitions: Vec<_> = eds["clusters"].as_object().unwrap().iter().collect();
    let steps = list(&definitions[0].1["steps"]).len();
    let mut orders: Vec<Vec<Value>> = vec![vec![]; definitions.len()];
    let mut live = None;
    let mut comparison = Comparison::default();

    for step in 0..steps {
        let routes: Vec<_> = definitions.iter().map(|(name, _)| to_cluster(name)).collect();
        let (mut fresh, mut sent) = (Bootstrap::new(), Bootstrap::new());
        for ((name, definition), order) in definitions.iter().zip(&mut orders) {
            let state = &definition["steps"][step];
            if state["order_kept"] != true {
                *order = list(&state["hosts"]).to_vec();
            }
            fresh = fresh.cluster(name, definition, order);
            sent = sent.cluster(name, definition, list(&state["hosts"]));
        }
        let fresh = fresh.listener("e", &routes, &json!({})).write();
        let sent = sent.listener("e", &routes, &json!({})).write().load();
        let live = live.get_or_insert_with(|| clusters(&sent));

        for (index, (name, definition)) in definitions.iter().enumerate() {
            let state = &definition["steps"][step];
            let changed = live.get(name).unwrap().update(&sent.clusters[index].endpoints);
            assert_eq!(changed, step > 0 && state["order_kept"] != true, "{name} {}", state["step"]);
            let requests: Vec<_> = keys.iter().map(|key| request(name, key)).collect();
            let answers = fresh.ask(&requests, &[]);
            let picked = state.get("picked").map(picks);
            for (position, (key, answer)) in keys.iter().zip(&answers).enumerate() {
                let what = || format!("{name} {} {key}", state["step"]);
                let envoy = picked.as_ref().map(|picked| &state["hosts"][picked[position]]["address"]);
                comparison.equal(what, answer["endpoint"].as_str(), envoy.map(text));
                let pick = live.get(name).unwrap().pick(Some(xxh64(&crate::fixture::bytes(key)))).ok();
                let pick = pick.map(|pick| pick.endpoint.address.to_string());
                comparison.equal(what, pick.as_deref(), envoy.map(text));
            }
        }
    }
    comparison.finish(2 * 52 * 200);
}

/// Compares the first endpoint that Envoy tried, because Steer does not retry.
#[test]
fn first_tries_are_alike() {
    let retry = section("retry");
    let (hosts, keys) = (list(&retry["hosts"]), list(&retry["keys"]));
    let config = Bootstrap::new()
        .cluster("ring", &json!({ "lb": "ring_hash" }), hosts)
        .cluster("maglev", &json!({ "lb": "maglev" }), hosts)
        .listener("r", &[to_cluster("ring"), to_cluster("maglev")], &json!({}))
        .write();
    let mut comparison = Comparison::default();
    for cluster in ["ring", "maglev"] {
        let requests: Vec<_> = keys.iter().map(|key| request(cluster, key)).collect();
        let answers = config.ask(&requests, &[]);
        for variant in ["plain", "pred"] {
            let tried = list(&retry[format!("{cluster}.{variant}")]);
            assert_eq!(tried.len(), keys.len());
            for ((key, answer), tried) in keys.iter().zip(&answers).zip(tried) {
                let first = picks(tried)[0];
                comparison.equal(
                    || format!("{cluster}.{variant} {key}"),
                    &answer["endpoint"],
                    &hosts[first]["address"],
                );
            }
        }
    }
    comparison.finish(240);
}
