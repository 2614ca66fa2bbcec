//! A client that uses its port again at once.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::net::{Net, on_every_path};
use crate::stream::{HANG, Learned, Side, Stream, forget, learned, learned_by_writing, reset};

/// Less than the time until a SYN is repeated (1 s), and much less than until the second repetition
/// (3 s).
const AT_ONCE: Duration = Duration::from_millis(900);

#[test]
fn after_fins_the_port_can_be_used_again() {
    on_every_path(|net| {
        let first = net.carried();
        let local = first.client_address;
        // The backend closes first, so that the backend's socket is in TIME_WAIT, and not the
        // client's.
        let (backend, mut client) = first.from(Side::Backend);
        drop(backend);
        assert_eq!(learned(&mut client, HANG), Learned::Fin);
        drop(client);
        again(net, local, AT_ONCE);
    });
}

#[test]
fn after_a_wait_of_the_client_the_port_can_be_used_again() {
    on_every_path(|net| {
        // Allows the client's kernel to reuse a connection in TIME_WAIT after a second, by its
        // timestamps.
        net.topology.clients.sysctl("net.ipv4.tcp_tw_reuse", "1").unwrap();
        let first = net.carried();
        let local = first.client_address;
        let (client, mut backend) = first.from(Side::Client);
        drop(client);
        assert_eq!(learned(&mut backend, HANG), Learned::Fin);
        drop(backend);
        std::thread::sleep(Duration::from_millis(1100));
        again(net, local, AT_ONCE);
    });
}

#[test]
fn after_a_reset_the_port_can_be_used_again() {
    on_every_path(|net| {
        for side in Side::BOTH {
            let first = net.carried();
            let local = first.client_address;
            let (resets, mut other) = first.from(side);
            reset(resets);
            assert_eq!(learned(&mut other, HANG), Learned::Reset);
            drop(other);
            again(net, local, AT_ONCE);
        }
    });
}

/// The client's host has lost the connection. It asks for a new one with the same ports, while the
/// proxy and the backend still have the old one.
#[test]
fn a_client_that_lost_its_state_can_use_the_port_again() {
    on_every_path(|net| {
        let first = net.carried();
        let local = first.client_address;
        let (client, mut backend) = first.from(Side::Client);
        forget(client);
        again(net, local, Duration::from_secs(3));
        assert_eq!(learned_by_writing(&mut backend, HANG), Learned::Reset);
    });
}

fn again(net: &Net<'_>, local: std::net::SocketAddr, patience: Duration) {
    let begin = Instant::now();
    let mut second: Stream = net.open_from(Some(local));
    second.echo();
    let took = begin.elapsed();
    eprintln!("the port worked again after {took:?}");
    assert!(took < patience, "{took:?}");
    net.expect_path(&second, net.setup.path);
    second.bulk(1 << 20);
    close(second);
    net.expect_nothing_left();
}

fn close(stream: Stream) {
    let (backend, mut client): (TcpStream, TcpStream) = stream.from(Side::Backend);
    drop(backend);
    assert_eq!(learned(&mut client, HANG), Learned::Fin);
}
