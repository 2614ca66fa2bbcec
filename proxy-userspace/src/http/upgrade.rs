//! An upgrade, from the request to two bare sockets: it gets a connection of its own to the endpoint,
//! since after the 101 that connection is the stream.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use httparse::Status;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

use super::fault::Fault;
use super::forward::{connect_fault, upstream_fault};
use crate::telemetry::flows::FlowGuard;
use crate::upstream::connect::{Connected, Connector, MAX_BUFFER};
use crate::upstream::mss::ClientMss;
use crate::upstream::ports::Lease;

/// Most heads of upgrades are shorter, in both directions.
const HEAD_BYTES: usize = 512;
/// Of a 101; hyper takes as many.
const MAX_HEADERS: usize = 100;

/// The upstream half of a stream. The downstream half joins it when hyper has written the 101.
#[derive(Debug)]
pub(super) struct Switched {
    pub(super) upstream: TcpStream,
    /// See [`Session::source`](crate::splice::Session::source).
    pub(super) source: Option<Lease>,
    /// What the endpoint sent right behind its 101.
    pub(super) to_downstream: Bytes,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) flow: FlowGuard,
}

/// An endpoint's answer to an upgrade.
pub(super) enum Answer {
    /// 101; the connection, and what was read from it behind the head.
    Switched(Response<()>, Connected, Bytes),
    /// Any other response.
    Declined(Response<Incoming>),
}

/// Asks the endpoint to switch protocols.
pub(super) async fn ask(
    connector: &Connector,
    endpoint: SocketAddr,
    client_mss: Option<ClientMss>,
    request: Request<Empty<Bytes>>,
) -> Result<Answer, Fault> {
    let connected = connector.connect_stream(endpoint, client_mss).await;
    let Connected { mut socket, source } = connected.map_err(|error| connect_fault(&error))?;
    let mut read = BytesMut::with_capacity(HEAD_BYTES);
    if let Some(response) = switch_at_once(&mut socket, &request, &mut read).await {
        return Ok(Answer::Switched(response, Connected { socket, source }, read.freeze()));
    }
    let exchange = Repeated { socket, read: read.freeze() };
    let (mut sender, mut connection) = http1::Builder::new()
        .max_buf_size(MAX_BUFFER)
        .handshake(TokioIo::new(exchange))
        .await
        .map_err(|error| upstream_fault(&error))?;

    let mut response = pin!(sender.send_request(request));
    let response = poll_fn(|cx| {
        if let Poll::Ready(result) = response.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        // The connection gives its outcome, good or bad, to the response.
        let _ended = connection.poll_without_shutdown(cx);
        response.as_mut().poll(cx)
    })
    .await
    .map_err(|error| upstream_fault(&error))?;

    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        tokio::spawn(async move {
            let _until_it_ends = source;
            if let Err(error) = connection.await {
                tracing::debug!(%endpoint, %error, "the connection of a declined upgrade broke");
            }
        });
        return Ok(Answer::Declined(response));
    }
    // hyper takes nothing behind the head for itself.
    let parts = connection.into_parts();
    let Repeated { socket, read } = parts.io.into_inner();
    let behind = [parts.read_buf, read].concat().into();
    Ok(Answer::Switched(response.map(drop), Connected { socket, source }, behind))
}

/// What nearly every endpoint does: the request is written, and what comes back first is a 101. `read` is then what came
/// behind its head. `None`: anything else, and `read` is what has come, for somebody who knows what to make of it.
async fn switch_at_once(
    socket: &mut TcpStream,
    request: &Request<Empty<Bytes>>,
    read: &mut BytesMut,
) -> Option<Response<()>> {
    socket.write_all(&head(request)).await.ok()?;
    loop {
        if socket.read_buf(read).await.ok()? == 0 {
            return None;
        }
        let (response, len) = match switched(read) {
            Some(switched) => switched?,
            None if read.len() < MAX_BUFFER => continue,
            None => return None,
        };
        read.advance(len);
        return Some(response);
    }
}

/// A request without a body, as it is written: see RFC 9112, 3.
fn head(request: &Request<Empty<Bytes>>) -> Vec<u8> {
    let mut head = format!("{} {} HTTP/1.1\r\n", request.method(), request.uri()).into_bytes();
    head.reserve(HEAD_BYTES);
    for (name, value) in request.headers() {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// A 101 and the length of its head. `None`: there is more to come; `Some(None)`: it is something else.
#[expect(clippy::option_option, reason = "the caller tells the two apart, and nobody else sees them")]
fn switched(read: &[u8]) -> Option<Option<(Response<()>, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut headers);
    let len = match parsed.parse(read) {
        Ok(Status::Complete(len)) => len,
        Ok(Status::Partial) => return None,
        Err(_) => return Some(None),
    };
    if parsed.version != Some(1) || parsed.code != Some(StatusCode::SWITCHING_PROTOCOLS.as_u16()) {
        return Some(None);
    }
    let mut response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS);
    for header in parsed.headers.iter() {
        response = response.header(header.name, header.value);
    }
    Some(response.body(()).ok().map(|response| (response, len)))
}

/// An exchange that has begun, for somebody who takes it for a new one: what he writes was written before, and he reads
/// what was read before.
struct Repeated {
    socket: TcpStream,
    read: Bytes,
}

impl AsyncRead for Repeated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.socket).poll_read(cx, buffer);
        }
        let len = self.read.len().min(buffer.remaining());
        buffer.put_slice(&self.read.split_to(len));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Repeated {
    fn poll_write(self: Pin<&mut Self>, _cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_written_line_by_line() {
        let request = Request::get("/a?b").header("host", "x").header("A", "1").header("a", "2");
        let head = head(&request.body(Empty::new()).unwrap());
        assert_eq!(head, b"GET /a?b HTTP/1.1\r\nhost: x\r\na: 1\r\na: 2\r\n\r\n");
    }

    #[test]
    fn only_a_whole_101_switches() {
        let head = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nA:  b \r\n\r\n";
        for len in 0..head.len() {
            assert!(switched(&head[..len]).is_none(), "{len}");
        }
        let (response, len) = switched(&[&head[..], b"more"].concat()).unwrap().unwrap();
        assert_eq!((response.status().as_u16(), len), (101, head.len()));
        assert_eq!(response.headers()["a"], "b");
        for other in [
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.0 101 X\r\n\r\n",
            "SSH-2.0\r\n",
            "HTTP/1.1 101 X\r\n : a\r\n\r\n",
        ] {
            assert!(switched(other.as_bytes()).unwrap().is_none(), "{other}");
        }
    }
}
