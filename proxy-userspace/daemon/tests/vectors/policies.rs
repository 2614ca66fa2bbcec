//! Hash policies: from a request to a hash, an endpoint and cookies.

use serde_json::{Value, json};
use steer_policy::affinity::xxh64;

use crate::fixture::{Bootstrap, Comparison, hosts_of, list, route, section, text};

#[test]
fn every_request_hashes_alike() {
    let policy = section("policy");
    let sets = policy["sets"].as_object().unwrap();
    let mut routes: Vec<_> = sets
        .iter()
        .map(|(name, set)| route(&format!("/{name}/"), text(&set["lb"]), &set["hash_policy"]))
        .collect();
    // This route tells the trusted client address of any request.
    routes.push(route("/trusted", "maglev", &json!([{ "connection_properties": { "source_ip": true } }])));
    let hosts = hosts_of(&policy["hosts"]);
    let config = Bootstrap::new()
        .cluster("maglev", &json!({ "lb": "maglev" }), &hosts)
        .cluster("ring_hash", &json!({ "lb": "ring_hash" }), &hosts)
        .listener("p", &routes, &json!({}))
        .write();

    let cases = list(&policy["requests"]);
    let requests: Vec<_> = cases.iter().map(request).collect();
    let trusting: Vec<_> = requests
        .iter()
        .map(|request| {
            let mut request = request.clone();
            request["path"] = "/trusted".into();
            request
        })
        .collect();
    let mut comparison = Comparison::default();
    let answers = config.ask(&requests, &[]);
    let trusted = config.ask(&trusting, &[]);
    for ((case, answer), trusted) in cases.iter().zip(&answers).zip(&trusted) {
        let endpoint = case["pick"].as_u64().map(|pick| &policy["hosts"][usize::try_from(pick).unwrap()]);
        comparison.equal(
            || case.to_string(),
            (&answer["hash"], &answer["endpoint"], answer["error"].is_null()),
            (&case["hash"], endpoint.unwrap_or(&Value::Null), true),
        );
        let cookies = case.get("set_cookie").cloned().unwrap_or_else(|| json!([]));
        comparison.equal(|| format!("cookies of {case}"), &answer["set_cookie"], &cookies);
        let client = format!("{:016x}", xxh64(text(&case["trusted"]).as_bytes()));
        comparison.equal(|| format!("client of {case}"), text(&trusted["hash"]), &*client);
    }
    comparison.finish(3 * 381);
}

fn request(case: &Value) -> Value {
    json!({
        "method": case.get("method").unwrap_or(&json!("GET")),
        "path": case["path"],
        "host": case.get("authority").unwrap_or(&json!("t")),
        "headers": case["headers"],
        "source": case["peer"],
        "local": case["local"],
    })
}
