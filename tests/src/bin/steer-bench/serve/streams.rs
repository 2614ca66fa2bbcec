//! `WebSockets` that do not depend on each other: echo and bulk.

use std::io;
use std::ops::Range;

use anyhow::{Result, bail};

use crate::link::{Link, Source};
use crate::ws::{self, Frames, Head, MAX_HEAD};

/// The endpoint acknowledges bulk frames each time it has received this many.
const ACKNOWLEDGED: u64 = 16;

/// Sends every frame back as it comes, without waiting for its end.
#[derive(Debug)]
pub(super) struct Echo(Frames);

impl Default for Echo {
    fn default() -> Self {
        Self(Frames::from_client())
    }
}

impl Echo {
    /// Handles `buffer[at]` and answers with one write. The buffer has room for a head before `at`.
    pub(super) fn received(
        &mut self,
        link: &mut Link,
        buffer: &mut [u8],
        mut at: Range<usize>,
    ) -> Result<()> {
        // The answer is made in place. It never overwrites unread bytes, because each head that
        // arrives is longer than the head of its answer. The first head is an exception, since a
        // part of it may have come with an earlier read. The room before `at` is for this case.
        let mut answer = 0;
        while let Some(part) = self.0.next(buffer, &mut at)? {
            if part.offset == 0 {
                let mut head = [0; MAX_HEAD];
                let size = part.head.echo().put(&mut head);
                buffer[answer..][..size].copy_from_slice(&head[..size]);
                answer += size;
            }
            ws::apply(part.head.mask.unwrap_or_default(), part.offset, &mut buffer[part.payload.clone()]);
            let size = part.payload.len();
            buffer.copy_within(part.payload, answer);
            answer += size;
        }
        link.send(&buffer[..answer])?;
        Ok(())
    }
}

/// Echoes the first message. The second message starts the download. All further messages are the
/// upload: after each 16 frames of it, the endpoint says how many it has received, in a message of
/// 8 bytes, little endian.
#[derive(Debug)]
pub(super) struct Bulk {
    download: bool,
    echo: Option<Echo>,
    frames: Frames,
    /// How many messages have come, including the second one.
    received: u64,
    acknowledged: u64,
    source: Source,
}

impl Bulk {
    pub(super) fn new(direction: &str) -> Result<Self> {
        let download = match direction {
            "upload" => false,
            "download" | "both" => true,
            other => bail!("bulk has no direction {other}"),
        };
        Ok(Self {
            download,
            echo: Some(Echo::default()),
            frames: Frames::from_client(),
            received: 0,
            acknowledged: 0,
            source: Source::default(),
        })
    }

    pub(super) fn received(
        &mut self,
        link: &mut Link,
        buffer: &mut [u8],
        mut at: Range<usize>,
    ) -> Result<()> {
        // The client waits for the echo, so these bytes contain nothing else.
        if let Some(mut echo) = self.echo.take() {
            return echo.received(link, buffer, at);
        }
        while let Some(part) = self.frames.next(buffer, &mut at)? {
            self.received += u64::from(part.last);
        }
        if !self.download {
            self.acknowledge(link)?;
        }
        Ok(())
    }

    /// Sends as much of the download as the socket takes. Its frame is `frame`. Returns whether the
    /// socket may take more.
    pub(super) fn pump(&mut self, link: &mut Link, frame: &[u8]) -> Result<bool> {
        if !self.download || self.received == 0 {
            return Ok(false);
        }
        let mut source = std::mem::take(&mut self.source);
        let more = source.pump(link, frame, |link| self.acknowledge(link))?;
        self.source = source;
        Ok(more)
    }

    fn acknowledge(&mut self, link: &mut Link) -> io::Result<()> {
        // The second message is not part of the upload.
        let received = self.received.saturating_sub(1);
        if received - self.acknowledged < ACKNOWLEDGED {
            return Ok(());
        }
        self.acknowledged = received;
        let mut message = [0; MAX_HEAD + 8];
        let size = Head::message(8, None).put(&mut message);
        message[size..size + 8].copy_from_slice(&received.to_le_bytes());
        link.send(&message[..size + 8])
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A link, and the socket that receives what the link sends.
    fn pair() -> (Link, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let client = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let (socket, _) = listener.accept().expect("a connection");
        socket.set_nonblocking(true).expect("a socket");
        (Link::connected(mio::net::TcpStream::from_std(socket)), client)
    }

    #[test]
    fn echoes_frames_that_come_in_pieces_of_any_size() {
        let payloads: Vec<Vec<u8>> =
            [0, 1, 125, 126, 3000, 0x1_0000, 2].iter().map(|&size| vec![b'a'; size]).collect();
        let sent: Vec<u8> = payloads.iter().flat_map(|it| ws::message(it, Some([1, 2, 3, 4]))).collect();
        let expected: Vec<u8> = payloads.iter().flat_map(|it| ws::message(it, None)).collect();
        for piece in [1, 2, 7, 13, 14, 15, 1000, sent.len()] {
            let (mut link, mut client) = pair();
            let mut echo = Echo::default();
            for piece in sent.chunks(piece) {
                let mut buffer = [&[0; MAX_HEAD][..], piece].concat();
                let end = buffer.len();
                echo.received(&mut link, &mut buffer, MAX_HEAD..end).expect("valid frames");
            }
            let mut received = vec![0; expected.len()];
            client.read_exact(&mut received).expect("the echo");
            assert!(received == expected, "the echo is wrong in pieces of {piece} bytes");
        }
    }
}
