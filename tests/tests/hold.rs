//! Holds back bytes that arrive at a socket (`tcp::hold`), on loopback. Needs root, because some
//! hosts allow only root to attach a socket filter.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use socket2::SockRef;
use steer_kernel::tcp::hold::Hold;
use steer_kernel::tcp::tcp_info::TcpInfo;
use steer_tests::require;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

#[tokio::test]
async fn payload_is_held_back_and_comes_later() {
    if !require::root() {
        return;
    }
    let (mut near, far) = pair();
    near.write_all(b"before ").unwrap();
    let hold = Hold::new(&far).unwrap();
    hold.settle().await.unwrap();
    near.write_all(b"during").unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    far.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut bytes = [0; 64];
    assert_eq!((&far).read(&mut bytes).unwrap(), 7);
    assert_eq!((&far).read(&mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(hold);
    // The peer has to retransmit the payload first.
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut rest = Vec::new();
    (&far).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"during");
}

#[tokio::test]
async fn acknowledgements_and_resets_get_through() {
    if !require::root() {
        return;
    }
    let (near, far) = pair();
    let hold = Hold::new(&far).unwrap();
    hold.settle().await.unwrap();
    (&far).write_all(b"x").unwrap();
    (&near).read_exact(&mut [0]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(TcpInfo::of(&far).unwrap().send_queue_is_empty());
    SockRef::from(&near).set_linger(Some(Duration::ZERO)).unwrap();
    drop(near);
    far.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!((&far).read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    drop(hold);
}
