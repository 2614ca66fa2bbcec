//! An upgrade, from the request to two bare sockets: it gets a connection of its own to the endpoint,
//! since after the 101 that connection is the stream.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use steer_kernel::tcp::socket::reset_on_close;
use tokio::net::TcpStream;

use super::fault::Fault;
use crate::streams::StreamGuard;
use crate::streams::ports::Lease;
use crate::upstream::connect::{ConnectError, Connected, MAX_BUFFER};

/// The upstream half of a stream. The downstream half joins it when hyper has written the 101.
#[derive(Debug)]
pub(super) struct Switched {
    pub(super) upstream: TcpStream,
    /// See [`Session::source`](crate::splice::Session::source).
    pub(super) source: Option<Lease>,
    /// What the endpoint sent right after its 101.
    pub(super) to_downstream: Bytes,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) guard: StreamGuard,
}

/// An endpoint's answer to an upgrade.
pub(super) enum Answer {
    /// 101; the connection, and what was read from it after the head.
    Switched(Response<()>, Connected, Bytes),
    /// Any other response.
    Declined(Response<Incoming>),
}

/// Asks the endpoint to switch protocols, once there is a connection.
pub(super) async fn ask(
    connected: impl Future<Output = Result<Connected, ConnectError>>,
    endpoint: SocketAddr,
    request: Request<Empty<Bytes>>,
) -> Result<Answer, Fault> {
    let Connected { socket, source } = connected.await.map_err(|error| Fault::from(&error))?;
    let (mut sender, mut connection) = http1::Builder::new()
        .max_buf_size(MAX_BUFFER)
        .handshake(TokioIo::new(socket))
        .await
        .map_err(|error| Fault::of_upstream(&error))?;

    let mut response = pin!(sender.send_request(request));
    let response = poll_fn(|cx| {
        if let Poll::Ready(result) = response.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        // The connection gives its outcome, good or bad, to the response.
        drop(connection.poll_without_shutdown(cx));
        response.as_mut().poll(cx)
    })
    .await
    .map_err(|error| Fault::of_upstream(&error))?;

    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%endpoint, %error, "the connection of a declined upgrade broke");
            }
            // The connection had the source port until now.
            drop(source);
        });
        return Ok(Answer::Declined(response));
    }
    // An endpoint that says 101 has read the request, so none of it waits here to be written; and
    // hyper keeps nothing that follows the head.
    let parts = connection.into_parts();
    let socket = parts.io.into_inner();
    reset_on_close(&socket);
    Ok(Answer::Switched(response.map(drop), Connected { socket, source }, parts.read_buf))
}
