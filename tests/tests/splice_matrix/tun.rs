//! A link of two tun devices: interfaces without Ethernet. They stand for WireGuard, PPP, IPIP and
//! GRE, which many kernels of test machines lack.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result};
use steer_tests::netns::NetNs;

/// Longer than any packet of these devices.
const LONGEST: usize = 2048;

/// Threads carry the packets from one device to the other until the link is dropped.
pub(crate) struct TunLink {
    ends: [(String, String); 2],
    threads: Vec<JoinHandle<()>>,
}

impl TunLink {
    /// Replaces the veth pair between `device` of the proxy's host and eth0 of `other` by tun
    /// devices with the same names and addresses. `link` numbers the addresses, as in `Topology`.
    pub(crate) fn between(proxy: &NetNs, device: &str, other: &NetNs, link: u8) -> Result<Self> {
        proxy.ip(&["link", "del", device])?;
        let ends = [(proxy, device, 1), (other, "eth0", 2)];
        let mut files = Vec::new();
        for (host, device, number) in ends {
            let file = host.run(|| tun(device))?.with_context(|| format!("cannot make {device}"))?;
            host.ip(&["address", "add", &format!("10.71.{link}.{number}/24"), "dev", device])?;
            host.ip(&["address", "add", &format!("fd71:0:0:{link}::{number}/64"), "dev", device, "nodad"])?;
            host.ip(&["link", "set", device, "up"])?;
            files.push(Arc::new(file));
        }
        let carry = |from: usize, to: usize| {
            let (from, to) = (Arc::clone(&files[from]), Arc::clone(&files[to]));
            thread::spawn(move || carry(&from, &to))
        };
        let threads = vec![carry(0, 1), carry(1, 0)];
        let ends = ends.map(|(host, device, _)| (host.name().to_owned(), device.to_owned()));
        Ok(Self { ends, threads })
    }
}

impl Drop for TunLink {
    fn drop(&mut self) {
        // A read from a device that is gone fails, which ends the thread.
        for (netns, device) in &self.ends {
            steer_tests::netns::ip(&["-n", netns, "link", "del", device]).ok();
        }
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed already.
            thread.join().ok();
        }
    }
}

fn carry(from: &File, to: &File) {
    let mut packet = [0; LONGEST];
    let (mut from, mut to) = (from, to);
    while let Ok(len) = from.read(&mut packet) {
        // The other device may be full or gone. Then the packet is lost.
        to.write_all(&packet[..len]).ok();
    }
}

/// Makes a tun device in the calling thread's namespace. It lives as long as the file.
fn tun(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all bits zero are a valid `ifreq`, which consists of integers and pointers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request is a valid `ifreq` and lives until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}
