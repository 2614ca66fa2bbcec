//! One request: where it goes, what the endpoint gets, what the client gets.

use std::error::Error;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, SERVER, SET_COOKIE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, request};
use http_body_util::{Empty, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::upgrade::OnUpgrade;
use steer_policy::routing::{self, Refusal, Routed};

use super::Downstream;
use super::fault::Fault;
use super::generation::ServedListener;
use super::turn::{Passed, RequestTimeouts};
use super::upgrade::{self, Answer, Switched};
use crate::streams::StreamInfo;
use crate::upstream::connect::Connected;
use crate::upstream::{Cluster, Pick, pool};

/// Answers one request: with the endpoint's response, or with Steer's own.
pub(super) async fn respond(
    downstream: Arc<Downstream>,
    mut request: Request<Incoming>,
) -> Response<ResponseBody> {
    let in_flight = InFlight { downstream };
    let downstream = &*in_flight.downstream;
    if let Some(on_upgrade) = request.extensions_mut().remove::<OnUpgrade>() {
        downstream.exchange.keep_upgrade(on_upgrade);
    }
    let (passed, started) = downstream.exchange.passed();
    // An HTTP/1.0 client may get a body that ends with the connection.
    let framed = request.version() != Version::HTTP_10;

    let listener = downstream.current_listener();
    let mut cluster: Option<&Cluster> = None;
    let mut response = match forward(downstream, &listener, request, passed, &mut cluster).await {
        Ok(response) => response,
        Err(fault) => {
            downstream.count_fault(fault);
            tracing::debug!(
                client = %downstream.connection.remote,
                listener = listener.config.name,
                cluster = cluster.map(|cluster| &*cluster.name),
                fault = fault.kind(),
                status = fault.status().as_u16(),
                "request answered with a fault"
            );
            fault.response(listener.server_name.clone()).map(Source::Steer)
        }
    };
    if matches!(passed, Passed::Upgrade { .. }) && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        close_declined(&mut response, passed);
    }
    if downstream.exchange.is_leaving() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }

    let metrics = &downstream.shared.metrics;
    match cluster {
        Some(cluster) => cluster.count_request(response.status()),
        None => metrics.requests.with_label_values(&["", response.status().as_str()]).inc(),
    }
    metrics.request_seconds.observe(started.elapsed().as_secs_f64());
    downstream.exchange.responded(framed);
    response.map(|source| ResponseBody { source, in_flight })
}

/// Sends the request to its endpoint and returns the endpoint's response as the client gets it.
/// `chosen` is set as soon as it is known.
async fn forward<'l>(
    downstream: &Downstream,
    listener: &'l ServedListener,
    request: Request<Incoming>,
    passed: Passed,
    chosen: &mut Option<&'l Cluster>,
) -> Result<Response<Source>, Fault> {
    if let Passed::Refused(fault) = passed {
        return Err(fault);
    }
    let (mut head, body) = request.into_parts();
    if head.method == Method::CONNECT {
        return Err(Refusal::BadTarget.into());
    }
    if head.version == Version::HTTP_10 {
        // RFC 9110, 7.8: Upgrade in an HTTP/1.0 request is to be ignored.
        head.headers.remove(UPGRADE);
    }

    let routed = routing::route(&listener.config, &downstream.connection, &mut head)?;
    // A configuration's routes name none but its own clusters.
    let cluster = listener.clusters.get(&routed.route.cluster).ok_or(Fault::NoHealthyEndpoint)?;
    *chosen = Some(cluster);
    let timeouts = RequestTimeouts {
        response: routed.route.timeout,
        idle: routed.route.idle_timeout.unwrap_or(listener.config.options.stream_idle_timeout),
    };
    downstream.exchange.limit(timeouts);
    let pick = cluster.pick(routed.hash).map_err(|_none| Fault::NoHealthyEndpoint)?;
    head.version = Version::HTTP_11;
    let chosen = Chosen { listener, cluster, routed, pick };

    match passed {
        // Boxed, so that ordinary requests do not keep room for what it needs.
        Passed::Upgrade { .. } if chosen.routed.upgrade => Box::pin(switch(downstream, head, &chosen)).await,
        // The body's framing was cut off the head, for the upgrade that it is not to be.
        Passed::Upgrade { had_body: true } => Err(Refusal::UpgradeNotAllowed.into()),
        Passed::Request | Passed::Upgrade { had_body: false } | Passed::Refused(_) => {
            send(downstream, head, body, &chosen).await
        }
    }
}

/// Where a request goes, and by what.
struct Chosen<'l> {
    listener: &'l ServedListener,
    cluster: &'l Cluster,
    routed: Routed<'l>,
    pick: Pick,
}

/// An ordinary request, over the pool.
async fn send(
    downstream: &Downstream,
    mut head: request::Parts,
    body: Incoming,
    chosen: &Chosen<'_>,
) -> Result<Response<Source>, Fault> {
    if body.size_hint().exact().is_none() {
        // Said aloud, since hyper's client drops the body of a GET that only its type knows of.
        head.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    let method = head.method.clone();
    let request = Request::from_parts(head, body);
    let endpoint = chosen.pick.endpoint.address;
    let sent = downstream.shared.pool.send(chosen.cluster, endpoint, request);
    let response = unless_failed(downstream, sent).await?.map_err(|error| {
        let fault = downstream.exchange.fault().unwrap_or_else(|| Fault::of_upstream(&error));
        tracing::debug!(%endpoint, error = &error as &dyn Error, %fault, "request failed");
        fault
    })?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Fault::UnaskedSwitch);
    }
    Ok(to_client(chosen, &method, response).map(Source::Endpoint))
}

/// An upgrade, on a connection of its own.
async fn switch(
    downstream: &Downstream,
    head: request::Parts,
    chosen: &Chosen<'_>,
) -> Result<Response<Source>, Fault> {
    let Chosen { listener, cluster, routed, pick } = chosen;
    let endpoint: SocketAddr = pick.endpoint.address;
    let method = head.method.clone();
    let request = Request::from_parts(head, Empty::<Bytes>::new());
    let connected =
        cluster.connector.connect_stream(endpoint, downstream.client_tcp, downstream.shared.ports.as_ref());
    let asked = upgrade::ask(connected, endpoint, request);
    match unless_failed(downstream, asked).await?? {
        Answer::Declined(response) => {
            let response = response.map(pool::Body::from);
            Ok(to_client(chosen, &method, response).map(Source::Endpoint))
        }
        Answer::Switched(response, upstream, to_downstream) => {
            let idle_timeout =
                routed.route.idle_timeout.unwrap_or(listener.config.options.stream_idle_timeout);
            let guard = downstream.shared.streams.open(StreamInfo {
                client: downstream.connection.remote,
                cluster: Arc::clone(&cluster.name),
                endpoint,
                key_hash: routed.hash,
            });
            let Connected { socket: upstream, source } = upstream;
            downstream.exchange.switch(Switched { upstream, source, to_downstream, idle_timeout, guard });
            let response = response.map(|()| Full::default());
            Ok(to_client(chosen, &method, response).map(Source::Steer))
        }
    }
}

/// Waits for `future` unless the request has failed meanwhile for a reason of its own.
async fn unless_failed<F: Future>(downstream: &Downstream, future: F) -> Result<F::Output, Fault> {
    let mut future = pin!(future);
    poll_fn(|cx| match downstream.exchange.fault() {
        Some(fault) => Poll::Ready(Err(fault)),
        None => future.as_mut().poll(cx).map(Ok),
    })
    .await
}

/// The endpoint's response as the client gets it.
fn to_client<B: Body>(chosen: &Chosen<'_>, method: &Method, response: Response<B>) -> Response<B> {
    let (mut head, body) = response.into_parts();
    let Chosen { listener, routed, .. } = chosen;
    routing::forward_response(&listener.config.options, &mut head.headers);
    for cookie in &routed.set_cookies {
        head.headers.append(SET_COOKIE, cookie.clone());
    }
    head.headers.insert(SERVER, listener.server_name.clone());
    let no_body = matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if no_body || body.size_hint().exact().is_none() && method != Method::HEAD {
        // Either hyper would not send it, or something else has framed the body.
        head.headers.remove(CONTENT_LENGTH);
    }
    head.version = Version::HTTP_11;
    Response::from_parts(head, body)
}

/// An upgrade that was not accepted ends its connection, since bytes of the stream may have been sent
/// ahead; unless the answer offers an upgrade and the next request can only be the next head.
fn close_declined(response: &mut Response<Source>, passed: Passed) {
    let offers_upgrade = response.headers().contains_key(UPGRADE);
    if !offers_upgrade || passed != (Passed::Upgrade { had_body: false }) {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

/// Ends the request's turn when its response has gone, whole or not.
struct InFlight {
    downstream: Arc<Downstream>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.downstream.exchange.finish();
    }
}

/// Where the body of a response comes from.
pub(super) enum Source {
    Endpoint(pool::Body),
    Steer(Full<Bytes>),
}

pub(super) struct ResponseBody {
    source: Source,
    in_flight: InFlight,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        match &mut this.source {
            Source::Endpoint(body) => {
                let frame = Pin::new(body).poll_frame(cx);
                if matches!(frame, Poll::Ready(Some(Err(_)))) {
                    this.in_flight.downstream.exchange.break_off();
                    this.in_flight.downstream.count_fault(Fault::ResponseBroken);
                }
                frame
            }
            Source::Steer(body) => Pin::new(body)
                .poll_frame(cx)
                .map(|frame| frame.map(|frame| frame.map_err(|never| match never {}))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Endpoint(body) => body.is_end_stream(),
            Source::Steer(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Endpoint(body) => body.size_hint(),
            Source::Steer(body) => body.size_hint(),
        }
    }
}
