//! How two processes, perhaps of different versions, talk to each other. Each message is JSON in
//! one packet of a SOCK_SEQPACKET socket, with descriptors beside the JSON.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use steer_kernel::ready;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::TakeoverError;
use super::message::Message;

/// The most descriptors of one message. The kernel's limit is SCM_MAX_FD, 253.
pub(super) const MAX_DESCRIPTORS: usize = 64;
/// The longest message: the addresses of some thousand listeners fit.
const MAX_BYTES: usize = 128 * 1024;

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    socket: AsyncFd<OwnedFd>,
    /// The process id of the other end; 0 if the process is in another PID namespace.
    pub(super) pid: i32,
    /// The user id of the other end.
    pub(super) uid: u32,
}

impl Channel {
    /// Must be called inside a tokio runtime. The socket must be connected and not block.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        let peer = getsockopt(&socket, PeerCredentials)?;
        let socket = ready::descriptor(socket, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { socket, pid: peer.pid(), uid: peer.uid() })
    }

    pub(super) async fn send(
        &self,
        message: &Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), TakeoverError> {
        let bytes = message.encode().map_err(|error| self.broken(error.into()))?;
        let send = |socket: &OwnedFd| {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut room);
            if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
            Ok(())
        };
        match timeout(super::ANSWER, self.socket.async_io(Interest::WRITABLE, send)).await {
            Ok(sent) => sent.map_err(|error| self.broken(error)),
            Err(_) => Err(TakeoverError::Silent { pid: self.pid }),
        }
    }

    /// Receives the next message and its descriptors. The message has to come `within` this time.
    pub(super) async fn receive(&self, within: Duration) -> Result<(Message, Vec<OwnedFd>), TakeoverError> {
        let receive = self.socket.async_io(Interest::READABLE, receive);
        let (bytes, descriptors) = match timeout(within, receive).await {
            Ok(received) => received.map_err(|error| self.broken(error))?,
            Err(_) => return Err(TakeoverError::Silent { pid: self.pid }),
        };
        if bytes.is_empty() {
            return Err(TakeoverError::Ended { pid: self.pid });
        }
        match Message::decode(&bytes) {
            Ok(Message::Refused { why }) => Err(TakeoverError::Refused { pid: self.pid, why }),
            Ok(message) => Ok((message, descriptors)),
            Err(said) => Err(TakeoverError::Unexpected { pid: self.pid, said }),
        }
    }

    pub(super) fn unexpected(&self, message: &Message) -> TakeoverError {
        TakeoverError::Unexpected { pid: self.pid, said: format!("{message:?}") }
    }

    fn broken(&self, source: io::Error) -> TakeoverError {
        match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                TakeoverError::Ended { pid: self.pid }
            }
            _ => TakeoverError::Broken { pid: self.pid, source },
        }
    }
}

/// Receives one packet. A packet of no bytes: the other end is closed.
fn receive(socket: &OwnedFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MAX_BYTES];
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
    }
    bytes.truncate(received.bytes);
    Ok((bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::SocketAddr;
    use std::os::fd::AsFd as _;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Channel::new(one).unwrap(), Channel::new(other).unwrap())
    }

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn messages_arrive_whole_and_with_their_descriptors() {
        let (one, other) = pair();
        let null = File::open("/dev/null").unwrap();
        let addresses = (0..2000).map(|port| SocketAddr::from(([192, 0, 2, 1], port))).collect();
        let long = Message::Ready { addresses };
        one.send(&Message::Sockets { more: true }, &[null.as_fd(); MAX_DESCRIPTORS]).await.unwrap();
        one.send(&long, &[]).await.unwrap();
        let (message, descriptors) = other.receive(SOON).await.unwrap();
        assert_eq!((message, descriptors.len()), (Message::Sockets { more: true }, MAX_DESCRIPTORS));
        assert_eq!(other.receive(SOON).await.unwrap().0, long);
        assert_eq!(u32::try_from(other.pid).unwrap(), std::process::id());
        drop(one);
        assert!(matches!(other.receive(SOON).await, Err(TakeoverError::Ended { .. })));
        assert!(matches!(other.send(&Message::Prepared, &[]).await, Err(TakeoverError::Ended { .. })));
    }

    #[tokio::test]
    async fn silence_nonsense_and_refusals_are_told_apart() {
        let (one, other) = pair();
        let silent = other.receive(Duration::from_millis(10)).await;
        assert!(matches!(silent, Err(TakeoverError::Silent { .. })));
        one.send(&Message::Refused { why: "busy".to_owned() }, &[]).await.unwrap();
        assert!(
            matches!(other.receive(SOON).await, Err(TakeoverError::Refused { why, .. }) if why == "busy")
        );
        rustix::net::send(one.socket.get_ref(), b"{\"later\":{}}", SendFlags::empty()).unwrap();
        let error = other.receive(SOON).await.unwrap_err().to_string();
        assert!(error.contains("later"), "{error}");
    }
}
