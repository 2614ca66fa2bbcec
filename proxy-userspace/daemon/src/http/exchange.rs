//! One request and its response: where the request goes, what the endpoint gets, what the client gets.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use steer_kernel::tcp::socket::reset_on_close;
use steer_policy::http1::Version;
use steer_policy::http1::body::BodyWriter;
use steer_policy::http1::fields::Spelling;
use steer_policy::http1::name::Known;
use steer_policy::http1::request::{BodyFraming, RequestHead};
use steer_policy::http1::response::ResponseHead;
use steer_policy::routing::{self, Routed};

use super::downstream::{Downstream, Waits};
use super::fault::Fault;
use super::generation::ServedListener;
use super::reply::{Asked, Reply};
use super::transfer::{Cut, Transfer};
use crate::io::Io;
use crate::splice::Session;
use crate::streams::ports::Lease;
use crate::streams::{StreamGuard, StreamInfo};
use crate::upstream::Cluster;
use crate::upstream::connect::{Connected, Connector};
use crate::upstream::pool::Key;

/// A response head that is longer is an error.
const MAX_RESPONSE_HEAD: usize = 64 * 1024;
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What follows for the connection after a request.
#[derive(Debug)]
pub(super) enum Next {
    /// The next request.
    Request,
    /// A close that loses nothing of the response.
    Close,
    /// A plain close: the client has gone.
    Drop,
    /// A reset, since the response would look complete, or nobody reads it.
    Reset,
    Stream(Box<Switched>),
}

/// An upgrade that the endpoint has accepted and the client knows of.
#[derive(Debug)]
pub(super) struct Switched {
    upstream: Io,
    /// See [`Session::source`].
    source: Option<Lease>,
    idle_timeout: Option<Duration>,
    guard: StreamGuard,
}

impl Switched {
    pub(super) fn session(self, downstream: Io) -> Session {
        let (downstream, to_upstream) = downstream.into_parts();
        let (upstream, to_downstream) = self.upstream.into_parts();
        // Without the buffers around the bytes: they would live as long as the stream.
        Session {
            downstream,
            upstream,
            source: self.source,
            to_upstream: to_upstream.to_vec().into(),
            to_downstream: to_downstream.to_vec().into(),
            idle_timeout: self.idle_timeout,
            guard: self.guard,
        }
    }
}

/// A request that is being answered.
struct Exchange<'l> {
    listener: &'l ServedListener,
    /// As soon as it is known.
    cluster: Option<&'l Cluster>,
    asked: Asked,
    started: Instant,
    waits: Waits,
    /// The request on its way to the endpoint.
    upload: Transfer,
}

/// Where a request goes, and by what.
struct Chosen<'l> {
    cluster: &'l Cluster,
    routed: Routed<'l>,
    endpoint: SocketAddr,
}

/// Answers the request whose head is unread: with the endpoint's response, or with Steer's own.
pub(super) async fn exchange(downstream: &mut Downstream, head: usize) -> Next {
    let listener = downstream.current_listener();
    let mut exchange = Exchange::new(&listener);
    match exchange.forward(downstream, head).await {
        Ok(next) => next,
        Err(fault) => exchange.refuse(downstream, fault).await,
    }
}

/// Answers what is not a request.
pub(super) async fn refuse(downstream: &mut Downstream, fault: Fault) -> Next {
    let listener = downstream.current_listener();
    Exchange::new(&listener).refuse(downstream, fault).await
}

impl<'l> Exchange<'l> {
    fn new(listener: &'l ServedListener) -> Self {
        let started = Instant::now();
        let idle = listener.config.options.stream_idle_timeout;
        Self {
            listener,
            cluster: None,
            asked: Asked::default(),
            started,
            waits: Waits { response: None, idle, moved: started },
            upload: Transfer::new(BodyFraming::None, BodyWriter::Bare, Vec::new()),
        }
    }

    async fn forward(&mut self, downstream: &mut Downstream, head: usize) -> Result<Next, Fault> {
        let chosen = self.choose(downstream, head);
        downstream.io.consume(head);
        let chosen = chosen?;
        // What came along of the body goes along.
        self.upload.take(&mut downstream.io)?;
        if chosen.routed.upgrade {
            // Boxed, so that ordinary requests do not keep room for what it needs.
            Box::pin(self.switch(downstream, &chosen)).await
        } else {
            self.send(downstream, &chosen).await
        }
    }

    /// Decides about the head, and writes what the endpoint gets.
    fn choose(&mut self, downstream: &Downstream, len: usize) -> Result<Chosen<'l>, Fault> {
        let mut head = RequestHead::parse(&downstream.io.unread()[..len])?;
        self.asked = Asked::of(&head);
        let listener = self.listener;
        let options = &listener.config.options;
        self.upload = Transfer::new(head.body, BodyWriter::Bare, Vec::new());
        if head.version == Version::Http10 {
            // RFC 9110, 7.8: Upgrade in an HTTP/1.0 request is to be ignored.
            head.fields.remove(Known::Upgrade);
        }
        let routed = routing::route(&listener.config, &downstream.connection, &mut head)?;
        self.asked.upgrade = routed.upgrade;
        // A configuration's routes name none but its own clusters.
        let cluster = listener.clusters.get(&routed.route.cluster).ok_or(Fault::NoHealthyEndpoint)?;
        self.cluster = Some(cluster);
        self.waits.response = routed.route.timeout;
        self.waits.idle = routed.route.idle_timeout.unwrap_or(options.stream_idle_timeout);
        let pick = cluster.pick(routed.hash).map_err(|_none| Fault::NoHealthyEndpoint)?;

        let body = if routed.upgrade { BodyFraming::None } else { head.body };
        let writer = match body {
            BodyFraming::Chunked => BodyWriter::Chunked,
            BodyFraming::None | BodyFraming::Length(_) | BodyFraming::UntilClose => BodyWriter::Bare,
        };
        match body {
            BodyFraming::Chunked => head.fields.append(Known::TransferEncoding, &b"chunked"[..]),
            BodyFraming::Length(length) => {
                head.fields.set(Known::ContentLength, length.to_string().into_bytes())
            }
            BodyFraming::None | BodyFraming::UntilClose => {}
        }
        if routed.upgrade {
            // Bytes after an upgrade have no framing: they follow the 101 unchanged.
            head.fields.remove_any(&[Known::ContentLength, Known::TransferEncoding]);
        }
        let mut out = Vec::with_capacity(len + 512);
        head.write(spelling(listener), &mut out);
        self.upload = Transfer::new(body, writer, out).spell(spelling(listener));
        Ok(Chosen { cluster, routed, endpoint: pick.endpoint.address })
    }

    /// An ordinary request, over the pool.
    async fn send(&mut self, downstream: &mut Downstream, chosen: &Chosen<'l>) -> Result<Next, Fault> {
        let shared = Arc::clone(&downstream.shared);
        let key = Key { cluster: Arc::clone(&chosen.cluster.name), endpoint: chosen.endpoint };
        loop {
            let (mut upstream, kept) = match shared.pool.take(&key) {
                Some(connection) => (connection, true),
                // Boxed, so that requests that need none do not keep room for it.
                None => (Box::pin(self.connect(downstream, chosen)).await?, false),
            };
            self.tell_to_continue(downstream).await?;
            match self.reply(downstream, &mut upstream, chosen).await {
                Ok(reply) if reply.status == 101 => return Err(Fault::UnaskedSwitch),
                Ok(reply) => {
                    let (next, reusable) = self.respond(downstream, &mut upstream, reply).await?;
                    if reusable {
                        shared.pool.put(key, upstream);
                    }
                    return Ok(next);
                }
                // An idle connection that the endpoint has closed just now.
                Err(Fault::EndpointClosed)
                    if kept
                        && upstream.unread().is_empty()
                        && (self.upload.is_untouched() || self.asked.may_repeat())
                        && self.upload.rewind() => {}
                Err(fault) => return Err(fault),
            }
        }
    }

    async fn connect(&self, downstream: &mut Downstream, chosen: &Chosen<'l>) -> Result<Io, Fault> {
        let connector: &Connector = &chosen.cluster.connector;
        let connected = downstream.unless_over(&self.waits, connector.connect(chosen.endpoint)).await?;
        connected.map(Io::new).map_err(|error| {
            tracing::debug!(error = &error as &dyn std::error::Error, "request failed");
            Fault::from(&error)
        })
    }

    /// An upgrade, on a connection of its own, since after the 101 that connection is the stream.
    async fn switch(&mut self, downstream: &mut Downstream, chosen: &Chosen<'l>) -> Result<Next, Fault> {
        let shared = Arc::clone(&downstream.shared);
        let without_timestamps = |source, endpoint| shared.splicer.mark_without_timestamps(source, endpoint);
        let connecting = chosen.cluster.connector.connect_stream(
            chosen.endpoint,
            downstream.client_tcp,
            shared.ports.as_ref(),
            &without_timestamps,
        );
        let connected = downstream.unless_over(&self.waits, connecting).await?;
        let Connected { socket, source } = connected.map_err(|error| Fault::from(&error))?;
        let mut upstream = Io::new(socket);
        let reply = self.reply(downstream, &mut upstream, chosen).await?;
        if reply.status != 101 {
            // `source` is dropped after `upstream`, which has the port.
            return self.respond(downstream, &mut upstream, reply).await.map(|(next, _reusable)| next);
        }
        let guard = shared.streams.open(StreamInfo {
            client: downstream.connection.remote,
            cluster: Arc::clone(&chosen.cluster.name),
            endpoint: chosen.endpoint,
            key_hash: chosen.routed.hash,
        });
        // Before the client learns that this is a stream: from then on a FIN at the end of the process
        // would be a lie.
        reset_on_close(upstream.socket());
        reset_on_close(downstream.io.socket());
        self.count(downstream, 101);
        if !downstream.write(&reply.head, self.waits.idle).await {
            return Err(Fault::ClientGone);
        }
        let idle_timeout = self.waits.idle;
        Ok(Next::Stream(Box::new(Switched { upstream, source, idle_timeout, guard })))
    }

    /// Tells a client to go on that waits before its body (RFC 9110, 10.1.1).
    async fn tell_to_continue(&mut self, downstream: &mut Downstream) -> Result<(), Fault> {
        if !std::mem::take(&mut self.asked.expects_continue) || self.upload.is_read() {
            return Ok(());
        }
        if downstream.write(CONTINUE, self.waits.idle).await { Ok(()) } else { Err(Fault::ClientGone) }
    }

    /// Waits for the endpoint's response head. Meanwhile the request goes on.
    async fn reply(
        &mut self,
        downstream: &mut Downstream,
        upstream: &mut Io,
        chosen: &Chosen<'l>,
    ) -> Result<Reply, Fault> {
        loop {
            match self.read_reply(downstream, upstream, chosen)? {
                // Steer has answered an expectation itself.
                Some((len, None)) => upstream.consume(len),
                Some((len, Some(reply))) => {
                    upstream.consume(len);
                    return Ok(reply);
                }
                None if upstream.unread().len() >= MAX_RESPONSE_HEAD => return Err(Fault::EndpointProtocol),
                None if !self.more(downstream, upstream).await? => return Err(Fault::EndpointClosed),
                None => {}
            }
        }
    }

    /// The length of the response head that has arrived, and the head that the client gets. The client
    /// gets nothing of an interim response.
    fn read_reply(
        &self,
        downstream: &Downstream,
        upstream: &Io,
        chosen: &Chosen<'l>,
    ) -> Result<Option<(usize, Option<Reply>)>, Fault> {
        let parsed = ResponseHead::parse(upstream.unread()).map_err(|_not_http| Fault::EndpointProtocol)?;
        let Some((len, head)) = parsed else { return Ok(None) };
        if head.status < 200 && head.status != 101 {
            return Ok(Some((len, None)));
        }
        let last = downstream.is_leaving() || !self.upload.is_done();
        let reply = Reply::new(head, &self.asked, self.listener, &chosen.routed.set_cookies, last)?;
        Ok(Some((len, Some(reply))))
    }

    /// Waits until the endpoint has sent something; false: there is no more. Meanwhile the request goes
    /// on.
    async fn more(&mut self, downstream: &mut Downstream, upstream: &mut Io) -> Result<bool, Fault> {
        poll_fn(|cx| {
            self.poll_upload(cx, downstream, upstream)?;
            if let Poll::Ready(filled) = upstream.poll_fill(cx) {
                return Poll::Ready(Ok(matches!(filled, Ok(1..))));
            }
            match downstream.poll_late(cx, &self.waits) {
                Some(_) if self.upload.is_starved() => Poll::Ready(Err(Fault::BodyTimeout)),
                Some(fault) => Poll::Ready(Err(fault)),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Moves the request on, and looks whether the client is still there.
    fn poll_upload(
        &mut self,
        cx: &mut Context<'_>,
        downstream: &mut Downstream,
        upstream: &mut Io,
    ) -> Result<(), Fault> {
        let mut moved = false;
        let polled = if self.upload.is_done() || self.upload.is_given_up() {
            Poll::Ready(Ok(()))
        } else {
            self.upload.poll(cx, &mut downstream.io, upstream, &mut moved)
        };
        if moved {
            self.waits.moved = Instant::now();
        }
        match polled {
            Poll::Ready(Err(Cut::Malformed(why))) => return Err(why.into()),
            Poll::Ready(Err(Cut::Sender)) => return Err(Fault::ClientGone),
            // The endpoint may have answered before.
            Poll::Ready(Err(Cut::Recipient(_broken))) => self.upload.give_up(),
            Poll::Ready(Ok(())) if downstream.poll_gone(cx) => return Err(Fault::ClientGone),
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        Ok(())
    }

    /// Sends the response. Returns also whether the endpoint's connection can be used again.
    ///
    /// # Errors
    /// Nothing has been sent.
    async fn respond(
        &mut self,
        downstream: &mut Downstream,
        upstream: &mut Io,
        reply: Reply,
    ) -> Result<(Next, bool), Fault> {
        let Reply { status, head, body, writer, framed, last, keeps_alive } = reply;
        let mut download = Transfer::new(body, writer, head)
            .spell(spelling(self.listener))
            .with_trailers(self.asked.reads_trailers);
        download.take(upstream).map_err(|_broken_chunk| Fault::EndpointProtocol)?;
        self.count(downstream, status);
        self.waits.response = None;
        let ended = poll_fn(|cx| {
            let mut moved = false;
            let polled = download.poll(cx, upstream, &mut downstream.io, &mut moved);
            if moved {
                self.waits.moved = Instant::now();
            }
            match polled {
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(Cut::Recipient(_broken))) => return Poll::Ready(Err(Fault::ClientGone)),
                Poll::Ready(Err(Cut::Malformed(_) | Cut::Sender)) => {
                    return Poll::Ready(Err(Fault::ResponseBroken));
                }
                Poll::Pending => {}
            }
            self.poll_upload(cx, downstream, upstream)?;
            downstream.poll_late(cx, &self.waits).map_or(Poll::Pending, |fault| Poll::Ready(Err(fault)))
        })
        .await;
        match ended {
            Ok(()) => {
                let over = self.upload.is_done() && upstream.unread().is_empty() && !upstream.has_ended();
                let next = if last { Next::Close } else { Next::Request };
                Ok((next, keeps_alive && over))
            }
            Err(fault) => {
                downstream.count_fault(fault);
                let next = match fault {
                    Fault::ClientGone => Next::Drop,
                    Fault::ResponseBroken if framed => Next::Close,
                    _ => Next::Reset,
                };
                Ok((next, false))
            }
        }
    }

    /// Answers with a fault, if anybody is there.
    async fn refuse(&mut self, downstream: &mut Downstream, fault: Fault) -> Next {
        downstream.count_fault(fault);
        tracing::debug!(
            client = %downstream.connection.remote,
            listener = self.listener.config.name,
            cluster = self.cluster.map(|cluster| &*cluster.name),
            fault = fault.kind(),
            status = fault.status().as_u16(),
            "request answered with a fault"
        );
        if fault == Fault::ClientGone {
            return Next::Drop;
        }
        let body_is_over = !fault.closes() && self.upload.discard(&mut downstream.io);
        let last = !body_is_over || self.asked.upgrade || !self.asked.keep_alive || downstream.is_leaving();
        let mut out = Vec::with_capacity(512);
        fault.write(&self.asked, &self.listener.server_name, last, &mut out);
        self.count(downstream, fault.status().as_u16());
        let sent = downstream.write(&out, self.waits.idle).await;
        match (sent, last) {
            (false, _) => Next::Reset,
            (true, true) => Next::Close,
            (true, false) => Next::Request,
        }
    }

    /// Counts the request as answered.
    fn count(&self, downstream: &Downstream, status: u16) {
        let metrics = &downstream.shared.metrics;
        match self.cluster {
            Some(cluster) => cluster.count_request(status),
            None => metrics.requests.with_label_values(&["", &status.to_string()]).inc(),
        }
        metrics.request_seconds.observe(self.started.elapsed().as_secs_f64());
    }
}

/// How the listener's heads are spelt.
fn spelling(listener: &ServedListener) -> Spelling {
    if listener.config.options.preserve_case { Spelling::Preserved } else { Spelling::LowerCase }
}
