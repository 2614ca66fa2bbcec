//! Steer in the guest's own network namespace, on a virtio card with two queues, GRO, segmentation
//! and checksum offload. The card is connected to a tap device of the host. The clients and one of
//! the two endpoints are on the host.

use std::net::SocketAddr;
use std::time::Duration;

use steer_tests::kernels::{self, BULK_BYTES, BULK_STREAMS, Has, STREAMS};
use steer_tests::netns::NetNs;
use steer_tests::{require, streams};

use crate::boot::Guest;
use crate::judge::Found;

const MESSAGES: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// The payload of a packet without offloads, in bytes: an MTU of 1,500, less the headers of IPv4
/// and of TCP with timestamps.
const PAYLOAD: f64 = 1448.0;
const NETDEV: &str = "tap,id=net,ifname=wire,script=no,downscript=no,queues=2,vhost=off";
const CARD: &str = "virtio-net-pci,netdev=net,mq=on,vectors=6";

/// Runs only in the long form, on the newest kernel of a stable Debian.
#[test]
fn streams_are_spliced_at_a_card_with_offloads() {
    let Some(directory) = kernels::directory().filter(|_| require::long()) else { return };
    let kernel = kernels::of_form(false).filter(|kernel| kernel.has == Has::Tcx).last().unwrap();
    let host = NetNs::new("steer-t", "wire").unwrap();
    host.ip(&["tuntap", "add", "dev", "wire", "mode", "tap", "multi_queue", "vnet_hdr"]).unwrap();
    host.ip(&["address", "add", "10.77.0.1/24", "dev", "wire"]).unwrap();
    host.ip(&["link", "set", "wire", "up"]).unwrap();
    streams::serve(&host, "10.77.0.1:3000".parse().unwrap()).unwrap();

    let more = ["-netdev", NETDEV, "-device", CARD];
    let mut guest = Guest::boot(&directory, kernel, "wire", Some(&host), &more).unwrap();
    guest.wait_for("ready").unwrap();
    let front: SocketAddr = "10.77.0.2:8080".parse().unwrap();
    let (mut clients, faults) = streams::open(&host, front, 0..STREAMS, PATIENCE);
    assert!(faults.is_empty(), "{faults:?}");
    guest.wait_for("opened").unwrap();
    let mut payload = 0;
    for tally in [
        streams::talk(&mut clients, MESSAGES),
        streams::flow(&mut clients[..BULK_STREAMS], BULK_BYTES),
        streams::close(&mut clients),
    ] {
        assert!(tally.faults.is_empty(), "{:?}", tally.faults);
        // The bytes pass to the endpoint and back.
        payload += 2 * tally.bytes;
    }
    let findings = guest.finish().unwrap();
    findings.iter().for_each(|finding| println!("    {finding}"));
    let found = Found::new(kernel, &findings);
    let wrong = [found.check(), found.check_wire()].concat();
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Acknowledgements count as packets, too. Without packets of many segments, the mean would be
    // less than half of a segment's payload.
    let each = payload as f64 / found.spliced();
    println!("    {each:.0} bytes of payload in a spliced packet");
    assert!(each > PAYLOAD, "only {each:.0} bytes of payload in a spliced packet: were offloads off?");
}
