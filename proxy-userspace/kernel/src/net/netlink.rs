//! Requests to the kernel by netlink. A socket belongs to the network namespace in which it was
//! opened.

use std::io;
use std::marker::PhantomData;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

use super::host;

/// An answer about one route or interface has some hundred bytes. The kernel limits an answer to 32
/// KiB.
const BUFFER_BYTES: usize = 32 << 10;

/// A socket for requests that the kernel answers before the system call of the request returns.
pub(crate) struct Netlink<M> {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    _messages: PhantomData<fn(M) -> M>,
}

impl Netlink<RouteNetlinkMessage> {
    /// For routes and interfaces.
    pub(crate) fn route() -> io::Result<Self> {
        Self::new(NETLINK_ROUTE)
    }
}

impl Netlink<NetfilterMessage> {
    /// For connection tracking, and the rules of nftables.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::new(NETLINK_NETFILTER)
    }
}

impl<M: NetlinkSerializable + NetlinkDeserializable> Netlink<M> {
    fn new(protocol: isize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER_BYTES], _messages: PhantomData })
    }

    /// # Errors
    /// What the kernel answered, as an OS error; or an answer that cannot be read.
    pub(crate) fn ask(&mut self, request: M) -> io::Result<M> {
        self.send(request, NLM_F_REQUEST)?;
        match self.answer()? {
            NetlinkPayload::InnerMessage(answer) => Ok(answer),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Tells the kernel to change something.
    ///
    /// # Errors
    /// What the kernel answered, as an OS error; or an answer that cannot be read.
    pub(crate) fn tell(&mut self, request: M) -> io::Result<()> {
        self.send(request, NLM_F_REQUEST | NLM_F_ACK)?;
        match self.answer()? {
            NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Asks for a list. After an error, answers may be left in the socket: it is to be dropped.
    ///
    /// # Errors
    /// What the kernel answered, as an OS error; or an answer that cannot be read. `Interrupted`:
    /// the list changed meanwhile.
    pub(crate) fn dump(&mut self, request: M) -> io::Result<Vec<M>> {
        self.send(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut answers = Vec::new();
        loop {
            // The kernel puts the next part into the socket before it returns the last one.
            let len = self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT)?;
            let mut rest = &self.buffer[..len];
            while !rest.is_empty() {
                let message = read(rest)?;
                if message.header.flags & NLM_F_DUMP_INTR != 0 {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                // Each message begins at a multiple of four.
                let end = message.header.length.next_multiple_of(4) as usize;
                rest = rest.get(end..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => return Err(io::ErrorKind::InvalidData.into()),
                }
            }
        }
    }

    fn send(&mut self, request: M, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let payload = NetlinkPayload::InnerMessage(request);
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), payload);
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let len = message.buffer_len();
        message.serialize(&mut self.buffer[..len]);
        self.socket.send(&self.buffer[..len], 0).map(drop)
    }

    fn answer(&mut self) -> io::Result<NetlinkPayload<M>> {
        loop {
            // The answer is there already. If the call would have to wait, the answer is lost.
            let len = self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT)?;
            let answer = read(&self.buffer[..len])?;
            // An answer with another number belongs to an earlier request, whose answer could not
            // be read.
            if answer.header.sequence_number == self.sequence {
                return Ok(answer.payload);
            }
        }
    }
}

fn read<M: NetlinkDeserializable>(bytes: &[u8]) -> io::Result<NetlinkMessage<M>> {
    NetlinkMessage::deserialize(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Tells which interfaces were removed.
pub(crate) struct LinkMonitor {
    socket: Socket,
    buffer: Vec<u8>,
}

impl LinkMonitor {
    pub(crate) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, libc::RTMGRP_LINK as u32))?;
        Ok(Self { socket, buffer: vec![0; BUFFER_BYTES] })
    }

    /// The indices of `known` interfaces that were removed since the last call. Never waits.
    pub(crate) fn removed(&mut self, known: impl Iterator<Item = u32>) -> io::Result<Vec<u32>> {
        let mut removed = Vec::new();
        loop {
            match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(len) => removed.extend(removed_interface(&self.buffer[..len])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(removed),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // More happened than the socket's buffer holds.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    removed.extend(known.filter(|ifindex| !exists(*ifindex)));
                    return Ok(removed);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Tells when the kernel's answers about routes may have changed: interfaces, addresses, routes,
/// rules, next hops.
#[derive(Debug)]
pub(crate) struct NetworkChanges(Socket);

impl NetworkChanges {
    /// `RTNLGRP_` numbers (include/uapi/linux/rtnetlink.h): LINK, IPV4_IFADDR, _ROUTE, _RULE,
    /// IPV6_IFADDR, _ROUTE, _RULE, NEXTHOP.
    const GROUPS: [u32; 8] = [1, 5, 7, 8, 9, 11, 19, 32];

    pub(crate) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let groups = Self::GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
        // One report is as good as many: the kernel reports a full buffer, too. So a socket that
        // nobody reads for a long time holds a few KiB only. The kernel raises this number to its
        // minimum.
        socket.set_rx_buf_sz::<libc::c_int>(1)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        Ok(Self(socket))
    }

    /// Whether something has changed since the last call. The kernel reports a change before the
    /// system call that made the change returns. Never waits.
    pub(crate) fn any(&mut self) -> bool {
        let mut any = false;
        loop {
            // It does not matter what changed. The rest of the message is thrown away.
            match self.0.recv(&mut &mut [0_u8; 64][..], libc::MSG_DONTWAIT) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return any,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // More happened than the socket's buffer holds: ENOBUFS, once.
                Ok(_) | Err(_) => any = true,
            }
        }
    }
}

/// The index in a message that an interface is gone.
fn removed_interface(message: &[u8]) -> Option<u32> {
    // `struct nlmsghdr` (16 bytes) and `struct ifinfomsg`:
    // include/uapi/linux/{netlink,rtnetlink}.h. The rest changes from kernel to kernel.
    let kind = u16::from_ne_bytes(*message.get(4..)?.first_chunk()?);
    let family = *message.get(16)?;
    let ifindex = u32::from_ne_bytes(*message.get(20..)?.first_chunk()?);
    // With the family AF_BRIDGE, the message only tells that a port has left its bridge.
    (kind == libc::RTM_DELLINK && i32::from(family) == libc::AF_UNSPEC).then_some(ifindex)
}

/// If the kernel does not tell, the interface counts as present.
fn exists(ifindex: u32) -> bool {
    !matches!(host::interface(ifindex), Err(error) if error.raw_os_error() == Some(libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_removed_interfaces_are_reported() {
        let message = |kind: u16, family: u8| {
            let mut bytes = [0; 32];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes[16] = family;
            bytes[20..24].copy_from_slice(&7_u32.to_ne_bytes());
            bytes
        };
        assert_eq!(removed_interface(&message(libc::RTM_DELLINK, 0)), Some(7));
        assert_eq!(removed_interface(&message(libc::RTM_DELLINK, libc::AF_BRIDGE as u8)), None);
        assert_eq!(removed_interface(&message(libc::RTM_NEWLINK, 0)), None);
        assert_eq!(removed_interface(&message(libc::RTM_DELLINK, 0)[..23]), None);
        assert_eq!(removed_interface(&[]), None);
    }

    #[test]
    fn nothing_is_removed_from_a_quiet_machine() {
        let mut monitor = LinkMonitor::new().unwrap();
        assert!(monitor.removed([host::LOOPBACK_IFINDEX].into_iter()).unwrap().is_empty());
        assert!(exists(host::LOOPBACK_IFINDEX) && !exists(u32::MAX >> 1));
    }
}
