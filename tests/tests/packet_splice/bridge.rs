//! A host behind a bridge that changes the shape of the host's packets. A receiver must treat every
//! legal shape of a packet alike.
//!
//! ```text
//! host eth0 ── host bridge proxy ── odd proxy
//! ```

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};
use steer_tests::netns::NetNs;

use crate::shapes::{self, Shape};

/// Leaves room for headers that are inserted before TCP.
const MTU: &str = "1440";
/// How often a bridge checks whether it has to end.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) struct OddHost {
    pub(crate) netns: NetNs,
    _bridge: NetNs,
    shape: Arc<AtomicUsize>,
    bent: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl OddHost {
    /// The proxy's address towards the host.
    pub(crate) fn front(is_ipv4: bool) -> IpAddr {
        if is_ipv4 { [10, 73, 0, 1].into() } else { [0xfd73, 0, 0, 0, 0, 0, 0, 1].into() }
    }

    /// Makes a host next to the proxy. Its packets are plain until [`Self::send`] is called.
    pub(crate) fn beside(proxy: &NetNs, seed: u64) -> Self {
        let netns = NetNs::new("steer-t", "odd").unwrap();
        let bridge = NetNs::new("steer-t", "bridge").unwrap();
        let ip = |netns: &NetNs, line: String| netns.ip(&line.split(' ').collect::<Vec<_>>()).unwrap();
        for (host, device, near, number) in [(&netns, "eth0", "host", 2), (proxy, "odd", "proxy", 1)] {
            ip(host, format!("link add {device} type veth peer name {near} netns {}", bridge.name()));
            ip(host, format!("address add 10.73.0.{number}/24 dev {device}"));
            ip(host, format!("address add fd73::{number}/64 dev {device} nodad"));
            // The bridge can handle only single segments.
            host.without_super_packets(device).unwrap();
            ip(host, format!("link set {device} up"));
            ip(&bridge, format!("link set {near} up addrgenmode none"));
        }
        ip(&netns, format!("link set eth0 mtu {MTU}"));
        let (shape, bent) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let over = Arc::new(AtomicBool::new(false));
        let start = |from: &'static str, to: &'static str, bends: bool| {
            let (from, to) = bridge.run(|| (port(from), port(to))).unwrap();
            let (shape, bent, over) = (Arc::clone(&shape), Arc::clone(&bent), Arc::clone(&over));
            thread::spawn(move || {
                let mut random = StdRng::seed_from_u64(seed);
                carry(&from, &to, &over, |frame| {
                    let shape = Shape::ALL[shape.load(Ordering::Relaxed)];
                    let frames = shapes::bend(if bends { shape } else { Shape::Plain }, frame, &mut random);
                    bent.fetch_add(u64::from(frames.1), Ordering::Relaxed);
                    frames.0
                });
            })
        };
        let threads = vec![start("host", "proxy", true), start("proxy", "host", false)];
        Self { netns, _bridge: bridge, shape, bent, over, threads }
    }

    /// Gives this shape to all packets that the host sends from now on.
    pub(crate) fn send(&self, shape: Shape) {
        let index = Shape::ALL.iter().position(|known| *known == shape).unwrap();
        self.shape.store(index, Ordering::Relaxed);
    }

    /// The number of packets that were given another shape.
    pub(crate) fn bent(&self) -> u64 {
        self.bent.load(Ordering::Relaxed)
    }
}

impl Drop for OddHost {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed already.
            thread.join().ok();
        }
    }
}

/// A socket for the frames of a device in the calling thread's namespace.
fn port(device: &str) -> Socket {
    const ALL: u16 = (libc::ETH_P_ALL as u16).to_be();
    const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(ALL)))).unwrap();
    let name = std::ffi::CString::new(device).unwrap();
    // SAFETY: the name ends with a nul and lives until the call returns.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: `sockaddr_ll` is one of the address types that fit into the storage.
    let link = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    link.sll_family = libc::AF_PACKET as u16;
    link.sll_protocol = ALL;
    link.sll_ifindex = index.cast_signed();
    // SAFETY: the storage holds an address of this length.
    let address = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
    socket.bind(&address).unwrap();
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, which lives until the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            4,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    socket.set_read_timeout(Some(LOOK)).unwrap();
    socket.set_recv_buffer_size(8 << 20).unwrap();
    socket
}

fn carry(from: &Socket, to: &Socket, over: &AtomicBool, mut bend: impl FnMut(Vec<u8>) -> Vec<Vec<u8>>) {
    let mut buffer = vec![0; 1 << 16];
    while !over.load(Ordering::Relaxed) {
        let Ok(len) = io::Read::read(&mut &*from, &mut buffer) else { continue };
        for frame in bend(buffer[..len].to_vec()) {
            if let Err(error) = to.send(&frame) {
                assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{} bytes: {error}", frame.len());
            }
        }
    }
}
