//! The new process of a takeover: it takes over from another process.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use proxy_common::instance::Instance;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use steer_kernel::failpoint;
use steer_kernel::net::host;

use super::message::{Message, PROTOCOL};
use super::wire::Channel;
use super::{ANSWER, Process, TakeoverError, WORK, path_of};

/// A takeover that has begun. The other process still serves.
#[derive(Debug)]
pub struct Takeover {
    channel: Channel,
    process: Process,
    /// The listening sockets of the other process, also that of its admin server.
    pub sockets: Vec<TcpListener>,
}

/// The last step of a takeover. The other process has stopped accepting and has given up the
/// streams. Now this process tells it that this process serves.
#[derive(Debug)]
pub struct Confirmation {
    channel: Channel,
}

impl Takeover {
    /// Asks the process of an instance for its sockets. `None`: no process of the instance listens.
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The process refuses, or does not answer.
    pub async fn begin(instance: &Instance) -> Result<Option<Self>, TakeoverError> {
        let path = path_of(instance);
        let at_path = |error: Errno| TakeoverError::Socket { path: path.clone(), source: error.into() };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(at_path)?;
        let address = SocketAddrUnix::new(&path).map_err(at_path)?;
        match connect(&socket, &address) {
            Ok(()) => {}
            // No process has the instance, or the last one has ended without removing its socket.
            Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
            Err(error) => return Err(at_path(error)),
        }
        let channel =
            Channel::new(socket).map_err(|source| TakeoverError::Socket { path: path.clone(), source })?;
        let netns =
            host::netns_cookie().map_err(|source| TakeoverError::Broken { pid: channel.pid, source })?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        channel.send(&Message::TakeOver { protocol: PROTOCOL, version, netns }, &[]).await?;
        let mut sockets = Vec::new();
        loop {
            let (message, descriptors) = channel.receive(ANSWER).await?;
            let Message::Sockets { more } = message else { return Err(channel.unexpected(&message)) };
            sockets.extend(descriptors.into_iter().map(TcpListener::from));
            if !more {
                break;
            }
        }
        let process = Process::open(channel.pid);
        let process = process.map_err(|source| TakeoverError::Broken { pid: channel.pid, source })?;
        failpoint::reached("take_asked");
        Ok(Some(Self { channel, process, sockets }))
    }

    /// The process id of the other process.
    pub fn pid(&self) -> i32 {
        self.channel.pid
    }

    /// Waits until the other process has stopped accepting and has given up the streams. Returns
    /// the lock of the instance, if the other process has one. If the other process has died,
    /// returns no lock: then the lock is free.
    ///
    /// # Errors
    /// The other process does not answer, and may go on serving.
    pub async fn prepared(self) -> Result<(Confirmation, Option<File>), TakeoverError> {
        let Self { channel, process, .. } = self;
        let said = async {
            channel.send(&Message::Prepared, &[]).await?;
            failpoint::reached("take_prepared");
            channel.receive(WORK).await
        };
        let lock = match said.await {
            Ok((Message::Yours, descriptors)) => descriptors.into_iter().next(),
            Ok((message, _)) => return Err(channel.unexpected(&message)),
            // The lock is free only after the process has ended.
            Err(TakeoverError::Ended { pid }) if process.ends().await => {
                tracing::warn!(pid, "the other process has ended during the takeover; this process goes on");
                None
            }
            Err(error) => return Err(error),
        };
        failpoint::reached("take_yours");
        Ok((Confirmation { channel }, lock.map(|lock: OwnedFd| lock.into())))
    }
}

impl Confirmation {
    /// Tells the other process that this process accepts connections at these addresses. This
    /// process goes on even if the other process does not get the message.
    pub async fn ready(self, addresses: Vec<SocketAddr>) {
        let told = self.channel.send(&Message::Ready { addresses }, &[]).await;
        failpoint::reached("take_ready");
        match told {
            Ok(()) => tracing::info!(
                pid = self.channel.pid,
                "took over; the other process ends when its last streams and connections have ended"
            ),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "took over; the other process could not be told"
            ),
        }
    }
}
