//! Streams after an upgrade, with both ends here: endpoints that echo, and clients that compare.
//! For machines that have only a program of this package, so it uses plain threads.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::thread;
use std::time::Duration;

use crate::netns::NetNs;
use anyhow::{Context as _, Result, ensure};

const SWITCHING: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
      sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
const CHUNK: usize = 16 * 1024;
/// The longest message, in bytes.
const LONGEST: u64 = 30_000;

/// Listens at `address` in `netns`, answers every upgrade, and echoes, until the process ends.
///
/// # Errors
/// When it cannot listen at the address.
pub fn serve(netns: &NetNs, address: SocketAddr) -> Result<()> {
    let listener = netns.run(|| TcpListener::bind(address))?;
    let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            match stream {
                // The client notices if its stream ends early.
                Ok(stream) => drop(thread::spawn(move || echo(stream))),
                Err(error) => return eprintln!("{address} accepts no more: {error}"),
            }
        }
    });
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    read_head(&mut stream)?;
    stream.write_all(SWITCHING)?;
    let mut bytes = vec![0; CHUNK];
    loop {
        match stream.read(&mut bytes)? {
            0 => return stream.shutdown(std::net::Shutdown::Write),
            size => stream.write_all(&bytes[..size])?,
        }
    }
}

/// Reads the head of a request or response. The peer sends nothing after the head before the
/// answer.
fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// The client's end of a stream.
#[derive(Debug)]
pub struct Client {
    id: u64,
    stream: TcpStream,
    random: Random,
    is_good: bool,
}

impl Client {
    /// Opens a stream from `netns` through the Steer at `front`, and returns when its 101 has come.
    /// Different `id`s may be sent to different endpoints. Each wait takes at most `patience`.
    ///
    /// # Errors
    /// When the stream cannot be opened.
    pub fn open(netns: &NetNs, front: SocketAddr, id: u64, patience: Duration) -> Result<Self> {
        let mut stream = netns.run(|| TcpStream::connect(front))?.context("cannot connect")?;
        stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
        stream.set_read_timeout(Some(patience)).context("cannot set a time limit")?;
        stream.set_write_timeout(Some(patience)).context("cannot set a time limit")?;
        let request = format!(
            "GET / HTTP/1.1\r\nHost: {front}\r\nX-Forwarded-For: 192.0.2.{id}\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).context("cannot send the upgrade")?;
        let head = read_head(&mut stream).context("no answer to the upgrade")?;
        ensure!(head.starts_with("HTTP/1.1 101 "), "the upgrade was answered with {:?}", head.lines().next());
        Ok(Self { id, stream, random: Random(id + 1), is_good: true })
    }

    /// The client's own address.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn address(&self) -> Result<SocketAddr> {
        self.stream.local_addr().context("cannot get the client's address")
    }

    /// Whether nothing has gone wrong with the stream.
    pub fn is_good(&self) -> bool {
        self.is_good
    }

    /// Sends `messages` of 1 to 30,000 bytes, each after the echo of the one before. Returns how
    /// many bytes came back.
    fn talk(&mut self, messages: u32) -> Result<u64> {
        let mut bytes = 0;
        for number in 0..messages {
            let size = match number {
                0 => 1,
                1 => LONGEST,
                _ => 1 + self.random.next() % LONGEST,
            };
            let message = self.random.bytes(usize::try_from(size).context("a size")?);
            bytes += self.exchange(&message).with_context(|| format!("message {number} of {size} bytes"))?;
        }
        Ok(bytes)
    }

    /// Sends `bytes` as fast as the socket takes them, and compares the echo at the same time.
    fn flow(&mut self, bytes: usize) -> Result<u64> {
        let message = self.random.bytes(bytes);
        self.exchange(&message)
    }

    fn exchange(&self, message: &[u8]) -> Result<u64> {
        thread::scope(|scope| {
            let writer = scope.spawn(|| (&self.stream).write_all(message));
            let mut echoed = vec![0; message.len()];
            let read = (&self.stream).read_exact(&mut echoed).context("the echo");
            if read.is_err() {
                // Otherwise the writer would wait forever, because nobody reads any more. The peer
                // may have closed the stream already.
                self.stream.shutdown(std::net::Shutdown::Both).ok();
            }
            let written = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?;
            written.context("the message")?;
            read?;
            let differs = message.iter().zip(&echoed).position(|(sent, came)| sent != came);
            ensure!(differs.is_none(), "byte {differs:?} of {} comes back as another", message.len());
            Ok(message.len() as u64)
        })
    }

    /// Closes the stream, and waits for the endpoint's FIN.
    fn close(&mut self) -> Result<u64> {
        self.stream.shutdown(std::net::Shutdown::Write).context("cannot close")?;
        let more = self.stream.read(&mut [0; 16]).context("waiting for the endpoint's FIN")?;
        ensure!(more == 0, "{more} bytes too many came back");
        Ok(0)
    }
}

/// Opens a stream for each id, one after the other. Returns the streams that were opened, and the
/// errors of the others.
pub fn open(
    netns: &NetNs,
    front: SocketAddr,
    ids: Range<u64>,
    patience: Duration,
) -> (Vec<Client>, Vec<String>) {
    let (mut clients, mut faults) = (Vec::new(), Vec::new());
    for id in ids {
        match Client::open(netns, front, id, patience) {
            Ok(client) => clients.push(client),
            Err(error) => faults.push(format!("stream {id}: {error:#}")),
        }
    }
    (clients, faults)
}

/// The result of something that several clients did at the same time.
#[derive(Debug, Default)]
pub struct Tally {
    /// How many streams did all of it.
    pub good: usize,
    /// How many bytes came back as they were sent.
    pub bytes: u64,
    /// The errors of the other streams.
    pub faults: Vec<String>,
}

/// Each client sends `messages` of 1 to 30,000 bytes, each after the echo of the one before.
pub fn talk(clients: &mut [Client], messages: u32) -> Tally {
    at_once(clients, |client| client.talk(messages))
}

/// Each client sends `bytes` as fast as its socket takes them, and compares the echo at the same
/// time.
pub fn flow(clients: &mut [Client], bytes: usize) -> Tally {
    at_once(clients, |client| client.flow(bytes))
}

/// Each client closes its stream, and waits for the endpoint's FIN.
pub fn close(clients: &mut [Client]) -> Tally {
    at_once(clients, Client::close)
}

fn at_once(clients: &mut [Client], work: impl Fn(&mut Client) -> Result<u64> + Sync) -> Tally {
    let mut tally = Tally::default();
    let tried = |client: &mut Client| {
        let done = work(client);
        client.is_good &= done.is_ok();
        done
    };
    thread::scope(|scope| {
        let running: Vec<_> =
            clients.iter_mut().map(|client| (client.id, scope.spawn(|| tried(client)))).collect();
        for (id, running) in running {
            match running.join().unwrap_or_else(|_| Err(anyhow::anyhow!("panicked"))) {
                Ok(bytes) => {
                    tally.good += 1;
                    tally.bytes += bytes;
                }
                Err(error) => tally.faults.push(format!("stream {id}: {error:#}")),
            }
        }
    });
    tally
}

/// Numbers that look random (xorshift64), and are the same in each run.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let words = (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(count).collect()
    }
}
