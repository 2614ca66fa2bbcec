//! Takeovers that are refused.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send, socket,
};
use std::os::fd::OwnedFd;
use steer_tests::require;
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, PACKET, SMALL, v4};

/// Connects to the instance's control socket.
fn asks(bed: &Bed<'_>) -> OwnedFd {
    let path: PathBuf = ["/run/steer", bed.steer.instance(), "takeover.sock"].iter().collect();
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

fn answer(socket: &OwnedFd) -> String {
    let mut bytes = [0; 4096];
    let (len, _) = recv(socket, &mut bytes, RecvFlags::empty()).unwrap();
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

#[test]
fn each_refusal_says_why_and_changes_nothing() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, v4(), PACKET);
    bed.under_load(SMALL, |bed, _| {
        bed.expect_spliced(SMALL.streams);
        let said = bed.refused(&topology.clients, &[]);
        assert!(said.contains("another network namespace"), "{said}");

        let later = asks(bed);
        let words = br#"{"take_over":{"protocol":9,"version":"9.0.0","netns":1}}"#;
        send(&later, words, SendFlags::empty()).unwrap();
        let said = answer(&later);
        assert!(said.contains("refused") && said.contains("speaks protocol 9"), "{said}");

        let nonsense = asks(bed);
        send(&nonsense, b"what", SendFlags::empty()).unwrap();
        assert!(answer(&nonsense).contains("refused"));

        // A takeover that stops after its first message.
        let netns = topology.proxy.run(|| steer_kernel::net::host::netns_cookie().unwrap()).unwrap();
        let stuck = asks(bed);
        let words = format!(r#"{{"take_over":{{"protocol":1,"version":"0","netns":{netns}}}}}"#);
        send(&stuck, words.as_bytes(), SendFlags::empty()).unwrap();
        assert!(answer(&stuck).contains("sockets"));
        let said = bed.refused(&topology.proxy, &[]);
        assert!(said.contains("another takeover is under way"), "{said}");
        drop(stuck);
        thread::sleep(Duration::from_millis(300));
        let mut old = bed.steer.take_over().unwrap();
        bed.expect_spliced(SMALL.streams);
        assert!(old.wait(HANG).unwrap().success(), "{}", old.tail());
    });
    bed.expect_no_stream();
}

#[test]
fn without_a_process_to_take_over_from_a_start_is_as_usual() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, v4(), PACKET);
    bed.steer.stop(libc::SIGKILL).unwrap();
    let successor = bed.steer.successor(None).unwrap();
    drop(bed.steer.replace(successor));
    bed.steer.wait_until_ready().unwrap();
    assert!(bed.steer.said().unwrap().contains("no process of the instance runs"));
    bed.under_load(SMALL, |bed, _| bed.expect_spliced(SMALL.streams));
    let directory = PathBuf::from("/run/steer").join(bed.steer.instance());
    assert!(directory.exists());
    bed.steer.stop(libc::SIGTERM).unwrap();
    assert!(!directory.exists());
}
