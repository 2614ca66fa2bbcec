//! The old process of a takeover: another process takes over from it.

use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proxy_common::instance::Instance;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};
use rustix::process::{Signal, geteuid, pidfd_send_signal};
use steer_kernel::net::host;
use steer_kernel::ready;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::message::{Message, PROTOCOL};
use super::wire::{Channel, MAX_DESCRIPTORS};
use super::{ANSWER, Process, TakeoverError, WORK, path_of};

const BACKLOG: i32 = 16;
/// How long to wait after an error of accept: the process may have no descriptor left, and must
/// close one first.
const BACK_OFF: Duration = Duration::from_millis(100);

/// The control socket, at which other processes ask to take over. Only one process at a time may
/// take over.
#[derive(Debug)]
pub struct ControlSocket {
    requests: mpsc::Receiver<Request>,
    path: PathBuf,
    /// The inode number of the socket's file. Another process may have put its own socket in the
    /// place of the file.
    number: u64,
    is_left: bool,
    accepting: AbortHandle,
}

/// The request of another process to take over. This process still serves as before.
#[derive(Debug)]
pub struct Request {
    channel: Channel,
    process: Process,
    /// The version of the other process' binary.
    pub version: String,
    _only_one: OwnedSemaphorePermit,
}

impl ControlSocket {
    /// Opens the control socket. `taken_over`: this process has just taken over, and replaces the
    /// socket of the other process. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be made. Or another process listens at it, and this process has not taken
    /// over.
    pub fn open(instance: &Instance, taken_over: bool) -> Result<Self, TakeoverError> {
        let path = path_of(instance);
        let socket = make_socket(&path, taken_over);
        let (socket, number) =
            socket.map_err(|source| TakeoverError::Socket { path: path.clone(), source })?;
        let (send, requests) = mpsc::channel(1);
        let accepting = tokio::spawn(accept_all(socket, send)).abort_handle();
        Ok(Self { requests, path, number, is_left: false, accepting })
    }

    /// Waits for the next request.
    pub async fn request(&mut self) -> Request {
        match self.requests.recv().await {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }

    /// Closes the control socket and keeps its file: another process has put its own socket there,
    /// or is about to.
    pub fn leave(mut self) {
        self.is_left = true;
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.accepting.abort();
        if !self.is_left && fs::metadata(&self.path).is_ok_and(|there| there.ino() == self.number) {
            // Another process may have just removed the file.
            fs::remove_file(&self.path).ok();
            if let Some(directory) = self.path.parent() {
                // A directory with other files stays.
                fs::remove_dir(directory).ok();
            }
        }
    }
}

/// Makes a listening socket at `path`. Returns the socket and the inode number of its file. Unless
/// `taken_over`, fails if another process listens at `path`.
fn make_socket(path: &Path, taken_over: bool) -> io::Result<(AsyncFd<OwnedFd>, u64)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let new = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    if !taken_over && connect(&new()?, &SocketAddrUnix::new(path)?).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process of this instance listens at this socket",
        ));
    }
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    }
    // The socket listens and has its permissions before it gets its name.
    let unnamed = path.with_extension(format!("{}.new", std::process::id()));
    // A file with this name is left only by a crashed process that had the same process id.
    fs::remove_file(&unnamed).ok();
    let socket = new()?;
    bind(&socket, &SocketAddrUnix::new(&unnamed)?)?;
    fs::set_permissions(&unnamed, fs::Permissions::from_mode(0o600))?;
    listen(&socket, BACKLOG)?;
    let number = fs::metadata(&unnamed)?.ino();
    fs::rename(&unnamed, path)?;
    let socket = ready::descriptor(socket, Interest::READABLE)?;
    Ok((socket, number))
}

async fn accept_all(socket: AsyncFd<OwnedFd>, requests: mpsc::Sender<Request>) {
    let only_one = Arc::new(Semaphore::new(1));
    let accept = |socket: &OwnedFd| Ok(accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?);
    loop {
        match socket.async_io(Interest::READABLE, accept).await.and_then(Channel::new) {
            Ok(channel) => drop(tokio::spawn(let_in(channel, Arc::clone(&only_one), requests.clone()))),
            Err(error) => {
                tracing::warn!(%error, "cannot accept requests to take over");
                sleep(BACK_OFF).await;
            }
        }
    }
}

/// Receives the first message of another process. Passes on its request, or refuses.
async fn let_in(channel: Channel, only_one: Arc<Semaphore>, requests: mpsc::Sender<Request>) {
    let pid = channel.pid;
    let why = match examine(&channel, only_one).await {
        Ok((process, version, permit)) => {
            let request = Request { channel, process, version, _only_one: permit };
            // This fails only when this process stops, and then does not matter.
            return drop(requests.send(request).await);
        }
        Err(why) => why,
    };
    tracing::warn!(pid, why, "refused a takeover");
    // The other process may have ended.
    channel.send(&Message::Refused { why }, &[]).await.ok();
}

async fn examine(
    channel: &Channel,
    only_one: Arc<Semaphore>,
) -> Result<(Process, String, OwnedSemaphorePermit), String> {
    let own_uid = geteuid().as_raw();
    if channel.uid != own_uid && channel.uid != 0 {
        return Err(format!("user {} may not take over from user {own_uid}", channel.uid));
    }
    let (message, _) = channel.receive(ANSWER).await.map_err(|error| error.to_string())?;
    let Message::TakeOver { protocol, version, netns } = message else {
        return Err(channel.unexpected(&message).to_string());
    };
    if protocol != PROTOCOL {
        return Err(format!(
            "version {version} speaks protocol {protocol}, and {} only {PROTOCOL}: stop this process and start the other \
             one; spliced streams go on meanwhile",
            env!("CARGO_PKG_VERSION")
        ));
    }
    if host::netns_cookie().ok() != Some(netns) {
        return Err("it is in another network namespace".to_owned());
    }
    let process = Process::open(channel.pid)
        .map_err(|error| format!("process {} cannot be watched: {error}", channel.pid))?;
    let permit = only_one.try_acquire_owned();
    let permit =
        permit.map_err(|_| "another takeover is under way, or this process has been taken over from")?;
    Ok((process, version, permit))
}

impl Request {
    /// The process id of the process that asks to take over.
    pub fn pid(&self) -> i32 {
        self.channel.pid
    }

    /// Tells the other process that it cannot take over, and why.
    pub async fn refuse(self, why: &str) {
        let why = why.to_owned();
        tracing::warn!(pid = self.pid(), why, "refused a takeover");
        // The other process may have ended.
        self.channel.send(&Message::Refused { why }, &[]).await.ok();
    }

    /// Gives the listening sockets to the other process, and waits until it needs only the streams.
    ///
    /// # Errors
    /// The other process has ended, or does not answer. This process goes on.
    pub async fn prepare(&self, sockets: &[BorrowedFd<'_>]) -> Result<(), TakeoverError> {
        let mut rest = sockets;
        loop {
            let (some, others) = rest.split_at(rest.len().min(MAX_DESCRIPTORS));
            self.channel.send(&Message::Sockets { more: !others.is_empty() }, some).await?;
            rest = others;
            if rest.is_empty() {
                break;
            }
        }
        match self.channel.receive(WORK).await? {
            (Message::Prepared, _) => Ok(()),
            (message, _) => Err(self.channel.unexpected(&message)),
        }
    }

    /// Gives the lock of the instance, and with the lock the streams, to the other process. Waits
    /// until that process accepts connections, and returns the addresses at which it does.
    ///
    /// # Errors
    /// The other process has ended, or does not answer. See [`Self::end`].
    pub async fn complete(&self, lock: Option<&File>) -> Result<Vec<SocketAddr>, TakeoverError> {
        let lock: Vec<_> = lock.into_iter().map(|lock| lock.as_fd()).collect();
        self.channel.send(&Message::Yours, &lock).await?;
        match self.channel.receive(WORK).await? {
            (Message::Ready { addresses }, _) => Ok(addresses),
            (message, _) => Err(self.channel.unexpected(&message)),
        }
    }

    /// Makes sure that the other process has ended, so that it changes nothing that this process
    /// takes back.
    ///
    /// # Errors
    /// The other process may still be running.
    pub async fn end(self) -> io::Result<()> {
        // The closed connection also ends the other process, if that process waits for a message.
        drop(self.channel);
        if self.process.ends().await {
            return Ok(());
        }
        match pidfd_send_signal(self.process.0.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        if self.process.ends().await { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }
}
