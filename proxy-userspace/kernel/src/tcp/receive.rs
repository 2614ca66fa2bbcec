//! Reading from a TCP socket, and learning from the same system call whether that has emptied the
//! socket.
//!
//! A read that does not fill its buffer has usually emptied the socket. But a read also stops
//! before an urgent byte (tcp_recvmsg_locked, 6.18). If nothing more arrives, no event tells of the
//! bytes that wait there.

use std::io;
use std::mem::{self, size_of};
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;

/// What one read got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Received {
    /// 0: the peer's FIN.
    pub bytes: usize,
    /// Whether there is more to read, a FIN included; `None`: the kernel does not tell of this
    /// socket.
    pub more: Option<bool>,
}

/// Lets [`receive`] tell whether there is more (TCP_INQ), and leaves urgent bytes in their place
/// among the other bytes. The connections that a listener accepts get the listener's options.
///
/// # Errors
/// The descriptor is no TCP socket, or the kernel is older than 4.18.
pub fn prepare(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    socket2::SockRef::from(&socket).set_out_of_band_inline(true)?;
    let on: libc::c_int = 1;
    // SAFETY: the pointer is to a local of the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INQ,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Room for one message that holds one int, aligned as its header must be.
#[repr(C, align(8))]
struct Control([u8; 24]);

/// Reads once. Does not wait if the socket is non-blocking.
///
/// # Errors
/// Those of `recvmsg`.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = Control([0; 24]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a message without address, parts and control bytes is all zeroes.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>() as _;
    // SAFETY: the message points to one part, which is `buffer`, and to `control`, each with its
    // length; all of them live until the call returns.
    let received = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, 0) };
    let bytes = usize::try_from(received).map_err(|_negative| io::Error::last_os_error())?;
    Ok(Received { bytes, more: more(&message) })
}

fn more(message: &libc::msghdr) -> Option<bool> {
    // SAFETY: `message` was filled in by the kernel, and its control bytes are alive and aligned.
    let header = unsafe { libc::CMSG_FIRSTHDR(message) };
    if header.is_null() {
        return None;
    }
    // SAFETY: the pointer is not null, so a whole header lies within the control bytes.
    let head = unsafe { ptr::read(header) };
    let is_inq = head.cmsg_level == libc::IPPROTO_TCP && head.cmsg_type == libc::TCP_CM_INQ;
    // SAFETY: computes a number.
    let len = unsafe { libc::CMSG_LEN(size_of::<libc::c_int>() as u32) };
    if !is_inq || (head.cmsg_len as usize) < len as usize {
        return None;
    }
    // SAFETY: the header is whole, so what follows it is within the control bytes, or one byte
    // beyond them.
    let data = unsafe { libc::CMSG_DATA(header) };
    // SAFETY: the header says that an int follows; it may not be aligned.
    let left = unsafe { ptr::read_unaligned(data.cast::<libc::c_int>()) };
    Some(left > 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use socket2::SockRef;

    use super::*;

    #[test]
    fn a_read_says_what_an_urgent_mark_keeps_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        prepare(&listener).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        client.write_all(b"abc").unwrap();
        SockRef::from(&client).send_out_of_band(b"X").unwrap();
        client.write_all(b"def").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        while crate::tcp::tcp_info::unread(&socket).unwrap() < 7 {
            #[expect(clippy::disallowed_methods, reason = "the test has no runtime")]
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut buffer = [0; 64];
        let first = receive(&socket, &mut buffer).unwrap();
        assert_eq!((first, &buffer[..3]), (Received { bytes: 3, more: Some(true) }, &b"abc"[..]));
        let second = receive(&socket, &mut buffer).unwrap();
        assert_eq!((second.bytes, &buffer[..4]), (4, &b"Xdef"[..]));
        assert_eq!(receive(&socket, &mut buffer).unwrap().bytes, 0, "the FIN");
    }
}
