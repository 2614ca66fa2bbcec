//! `steer flows`, which reads the maps of another process.

use std::process::Command;

use serde_json::Value;
use steer_tests::eventually::eventually;
use steer_tests::steer::binary;

use crate::net::{Family, Net, Path, Setup, on};
use crate::stream::{HANG, Stream};

fn flows(arguments: &[&str]) -> String {
    let output = Command::new(binary().unwrap()).arg("flows").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The row of the stream, among the rows of all streams on this machine.
fn listed(stream: &Stream) -> Option<Value> {
    let all: Value = serde_json::from_str(&flows(&["--json"])).unwrap();
    let streams = all.as_array().unwrap().iter().filter_map(|steer| steer["streams"].as_array()).flatten();
    let is_it = |listed: &&Value| {
        let addresses = [("client", stream.client_address), ("source", stream.source)];
        addresses.iter().all(|(key, address)| listed[key] == address.to_string())
    };
    streams.filter(|listed| listed["state"] == "spliced").find(is_it).cloned()
}

#[test]
fn streams_are_read_from_the_maps_alone() {
    for family in [Family::V4, Family::V6] {
        on(Setup::new(Path::Packet, family), |net: &mut Net<'_>| {
            let mut stream = net.carried();
            stream.bulk(1 << 20);
            let found = eventually("the stream in steer flows", HANG, || Ok(listed(&stream))).unwrap();
            assert_eq!(found["endpoint"], stream.endpoint.to_string());
            assert_eq!(found["listener"], stream.front.to_string());
            let row = net.row(&stream).unwrap();
            for key in ["key_hash", "bytes_to_upstream", "bytes_to_downstream"] {
                assert_eq!(found[key], row[key], "{key}");
            }
            assert!(found["bytes_to_upstream"].as_u64().unwrap() >= 1 << 20);
            assert!(flows(&[]).contains(&stream.client_address.to_string()));
            drop(stream);
            net.expect_nothing_left();
        });
    }
}
