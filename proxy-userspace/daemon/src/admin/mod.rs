//! The admin listener: health, metrics and the live streams, for operators and scrapers. The admin
//! listener has no access control, so it belongs on loopback.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use crate::splice::coverage;
use crate::streams::Streams;
use crate::telemetry::Metrics;

/// What the admin pages show.
#[derive(Debug)]
pub struct Admin {
    metrics: Arc<Metrics>,
    streams: Arc<Streams>,
    ready: AtomicBool,
}

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const METRICS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

const INDEX: &str = "\
/healthz        200 while the process lives
/readyz         200 while the process accepts new connections, else 503
/metrics        Prometheus text format
/flows          the live upgraded streams, a JSON array, oldest first
/flows/summary  how many of them the kernel carries, and why not the others: a JSON array, by cluster
";

impl Admin {
    /// Not ready until [`Admin::set_ready`] says so.
    pub fn new(metrics: Arc<Metrics>, streams: Arc<Streams>) -> Arc<Self> {
        Arc::new(Self { metrics, streams, ready: AtomicBool::new(false) })
    }

    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Serves until the task is dropped.
    pub async fn serve(self: Arc<Self>, socket: Arc<TcpListener>) {
        let mut failing = false;
        loop {
            match socket.accept().await {
                Ok((stream, _peer)) => {
                    failing = false;
                    drop(tokio::spawn(Arc::clone(&self).connection(stream)));
                }
                Err(error) => {
                    // Said once: without a free descriptor, all tries fail until one is given back.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot accept an admin connection");
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream) {
        let answer = service_fn(|request| {
            let response = self.answer(&request);
            async move { Ok::<_, Infallible>(response) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(stream), answer)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "admin connection broke off");
        }
    }

    fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut response = page(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/" => page(StatusCode::OK, TEXT, INDEX),
            "/healthz" => page(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" if self.ready.load(Ordering::Relaxed) => page(StatusCode::OK, TEXT, "ready\n"),
            "/readyz" => page(StatusCode::SERVICE_UNAVAILABLE, TEXT, "not ready\n"),
            "/metrics" => {
                self.streams.publish_bytes();
                coverage::publish(&self.streams, &self.metrics);
                page(StatusCode::OK, METRICS, self.metrics.render())
            }
            "/flows" => {
                let rows: Vec<_> = self.streams.snapshot().iter().map(|stream| stream.row()).collect();
                json(&rows)
            }
            "/flows/summary" => json(&coverage::survey(&self.streams)),
            _ => page(StatusCode::NOT_FOUND, TEXT, format!("no such page; the pages are:\n{INDEX}")),
        }
    }
}

fn json(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_vec(value) {
        Ok(json) => page(StatusCode::OK, JSON, json),
        Err(error) => {
            page(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("cannot write this page: {error}\n"))
        }
    }
}

fn page(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::streams::StreamInfo;

    fn admin() -> Arc<Admin> {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        Admin::new(metrics, streams)
    }

    async fn get(admin: &Admin, path: &str) -> (StatusCode, String) {
        let response = admin.answer(&Request::get(path).body(()).unwrap());
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn readyz_says_whether_the_process_is_ready() {
        let admin = admin();
        assert_eq!(get(&admin, "/healthz").await.0, StatusCode::OK);
        assert_eq!(get(&admin, "/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
        admin.set_ready(true);
        assert_eq!(get(&admin, "/readyz").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn live_streams_are_listed_and_their_bytes_are_in_the_metrics() {
        let metrics = Metrics::new();
        let streams = Streams::new(&metrics);
        let admin = Admin::new(metrics, Arc::clone(&streams));
        assert_eq!(get(&admin, "/flows").await.1, "[]");
        let guard = streams.open(StreamInfo {
            client: "192.0.2.1:5000".parse().unwrap(),
            cluster: "sio".into(),
            endpoint: "192.0.2.9:3000".parse().unwrap(),
            key_hash: Some(1),
        });
        guard.stream().add_to_downstream(42);
        let rows: serde_json::Value = serde_json::from_str(&get(&admin, "/flows").await.1).unwrap();
        assert_eq!(rows[0]["client"], "192.0.2.1:5000");
        assert_eq!(rows[0]["key_hash"], "0000000000000001");
        assert_eq!(rows[0]["bytes_to_downstream"], 42);
        let (_, metrics) = get(&admin, "/metrics").await;
        let line = "steer_stream_bytes_total{cluster=\"sio\",direction=\"to_downstream\"} 42\n";
        assert!(metrics.contains(line), "{metrics}");
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_refused() {
        let admin = admin();
        let (status, text) = get(&admin, "/nothing").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(text.contains("/metrics"));
        let post = admin.answer(&Request::post("/flows").body(()).unwrap());
        assert_eq!(post.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
