//! From the request for an upgrade to the stream.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::support::{Backend, Setup, eventually, header, in_time, status};

const UPGRADE: &str = concat!(
    "GET /ws HTTP/1.1\r\nHost: t\r\nX-Forwarded-For: 198.51.100.7\r\nConnection: Upgrade\r\n",
    "Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
);
const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: y\r\n\r\n";

/// A backend that accepts the upgrade, sends `first` in the segment of the 101, then echoes.
async fn switching(first: &'static str) -> Backend {
    Backend::start(move |mut client| async move {
        client.head().await;
        client.send([SWITCH, first].concat()).await;
        let (mut reader, mut writer) = client.socket.split();
        tokio::io::copy(&mut reader, &mut writer).await.ok();
        writer.shutdown().await.ok();
    })
    .await
}

#[tokio::test]
async fn bytes_pass_both_ways_and_fin_ends_it() {
    let backend = switching("").await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send(UPGRADE).await;
    let head = client.head().await;
    assert_eq!(status(&head), "101");
    assert_eq!(header(&head, "connection"), Some("Upgrade"));
    assert_eq!(header(&head, "upgrade"), Some("websocket"));
    assert_eq!(header(&head, "sec-websocket-accept"), Some("y"));
    assert_eq!(header(&head, "server"), Some("steer"));
    client.send("hello").await;
    assert_eq!(client.exactly(5).await, b"hello");
    let flows = steer.streams.snapshot();
    assert_eq!(flows.len(), 1);
    assert_eq!(flows[0].info.endpoint, backend.address);
    assert!(flows[0].info.key_hash.is_some());
    eventually("a stream is no longer an HTTP connection", || steer.open_connections() == 0).await;
    client.socket.shutdown().await.unwrap();
    assert_eq!(client.rest().await.unwrap(), b"");
    eventually("the flow is gone", || steer.streams.is_empty()).await;
    let closed = &steer.metrics.streams_closed;
    assert_eq!(closed.with_label_values(&["c", "finished"]).get(), 1);
    assert_eq!(steer.requests("c", "101"), 1);
}

#[tokio::test]
async fn early_bytes_are_kept_in_both_directions_at_any_cut() {
    let backend = switching("from the backend").await;
    let steer = Setup::new(&[backend.address]).start().await;
    let early = [UPGRADE.as_bytes(), b"early \x00\x01\r\n\r\nGET / HTTP/1.1\r\n\r\n frames"].concat();
    let payload = &early[UPGRADE.len()..];
    for cut in (1..=early.len()).rev().step_by(3) {
        let mut client = steer.client().await;
        client.send(&early[..cut]).await;
        tokio::task::yield_now().await;
        client.send(&early[cut..]).await;
        assert_eq!(status(&client.head().await), "101", "cut at {cut}");
        assert_eq!(client.exactly(16).await, b"from the backend");
        assert_eq!(client.exactly(payload.len()).await, payload, "cut at {cut}");
    }
}

#[tokio::test]
async fn many_early_bytes_wait_for_their_turn() {
    let backend = switching("").await;
    let steer = Setup::new(&[backend.address]).start().await;
    let payload: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let mut client = steer.client().await;
    let mut whole = UPGRADE.as_bytes().to_vec();
    whole.extend_from_slice(&payload);
    // The buffers of loopback take everything without a reader.
    in_time("sending all bytes", client.send(&whole)).await;
    assert_eq!(status(&client.head().await), "101");
    assert!(client.exactly(payload.len()).await == payload);
}

#[tokio::test]
async fn nothing_goes_upstream_before_the_101() {
    let (saw, mut seen) = mpsc::channel(1);
    let backend = Backend::start(move |mut client| {
        let saw = saw.clone();
        async move {
            client.head().await;
            let ahead = tokio::time::timeout(Duration::from_millis(200), client.exactly(1)).await;
            saw.send(ahead.is_ok()).await.unwrap();
            client.send(SWITCH).await;
            saw.send(client.exactly(5).await == b"early").await.unwrap();
        }
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send([UPGRADE, "early"].concat()).await;
    assert!(!in_time("first look", seen.recv()).await.unwrap());
    assert!(in_time("second look", seen.recv()).await.unwrap());
}

#[tokio::test]
async fn an_announced_body_is_payload_of_the_stream() {
    for (headers, body) in [
        ("Content-Length: 3\r\n", "abc"),
        ("Transfer-Encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n"),
        ("Content-Length: 0\r\n", ""),
    ] {
        let (saw, mut seen) = mpsc::channel(1);
        let backend = Backend::start(move |mut client| {
            let saw = saw.clone();
            async move {
                saw.send(client.head().await).await.unwrap();
                client.send(SWITCH).await;
                let echoed = client.exactly(body.len()).await;
                client.send(echoed).await;
                client.head().await;
            }
        })
        .await;
        let steer = Setup::new(&[backend.address]).start().await;
        let mut client = steer.client().await;
        client.send(UPGRADE.replace("Sec-WebSocket-Key: x\r\n", headers)).await;
        client.send(body).await;
        assert_eq!(status(&client.head().await), "101");
        assert_eq!(client.exactly(body.len()).await, body.as_bytes());
        let head = seen.recv().await.unwrap();
        assert_eq!(header(&head, "transfer-encoding"), None, "{head}");
        assert!(matches!(header(&head, "content-length"), None | Some("0")), "{head}");
    }
}

#[tokio::test]
async fn a_declined_upgrade_passes_on_with_its_body() {
    for (response, code, body, stays) in [
        (&b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nplain"[..], "200", "plain", false),
        (b"HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 2\r\n\r\ngo", "302", "go", false),
        (b"HTTP/1.1 400 Bad Request\r\ncontent-length: 3\r\n\r\nbad", "400", "bad", false),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nfull", "503", "full", false),
        (
            b"HTTP/1.1 426 Upgrade Required\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\ncontent-length: 2\r\n\r\nv?",
            "426",
            "v?",
            true,
        ),
    ] {
        let backend = Backend::canned(response).await;
        let steer = Setup::new(&[backend.address]).start().await;
        let mut client = steer.client().await;
        client.send([UPGRADE, if stays { "" } else { "early" }].concat()).await;
        let (head, got) = client.response().await;
        assert_eq!((status(&head), got.as_str()), (code, body));
        assert_eq!(steer.requests("c", code), 1);
        assert!(steer.streams.is_empty());
        if stays {
            assert_eq!(header(&head, "upgrade"), Some("websocket"));
            client.send(UPGRADE).await;
            assert_eq!(status(&client.response().await.0), code);
        } else {
            assert_eq!(header(&head, "connection"), Some("close"), "{head}");
            assert_eq!(client.rest().await.unwrap(), b"");
        }
    }
}

#[tokio::test]
async fn a_declined_upgrade_streams_a_long_body() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        let piece = "x".repeat(100_000);
        for _ in 0..20 {
            client.send(format!("{:x}\r\n{piece}\r\n", piece.len())).await;
        }
        client.send("0\r\n\r\n").await;
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send(UPGRADE).await;
    client.head().await;
    assert_eq!(client.chunked().await.len(), 2_000_000);
    assert_eq!(client.rest().await.unwrap(), b"");
}

#[tokio::test]
async fn an_upgrade_where_none_is_allowed_is_403() {
    let backend = switching("").await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send(UPGRADE.replace("/ws", "/plain/ws")).await;
    client.send("early").await;
    let (head, _) = client.last_response().await;
    assert_eq!(status(&head), "403");
    assert_eq!(header(&head, "connection"), Some("close"));
    assert_eq!(steer.faults("upgrade_not_allowed"), 1);
    assert_eq!(backend.connections(), 0);
}

/// RFC 9110, 7.8: a server may ignore an offer. Apache's HttpClient 5.4 offers `TLS/1.2` with each
/// request.
#[tokio::test]
async fn offers_of_other_protocols_are_ignored_and_removed() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    for offer in ["TLS/1.2", "h2c", "websocket, h2c"] {
        for request in [UPGRADE.to_owned(), UPGRADE.replace("GET /ws", "POST /plain")] {
            client.send(request.replace("websocket", offer)).await;
            assert_eq!(status(&client.response().await.0), "200", "{offer}");
        }
    }
    for head in backend.heads() {
        assert_eq!((header(&head, "upgrade"), header(&head, "connection")), (None, None), "{head}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_before_the_101_takes_its_upgrade_along() {
    let (left, mut gone) = mpsc::channel(1);
    let backend = Backend::start(move |mut client| {
        let left = left.clone();
        async move {
            client.head().await;
            client.rest().await.ok();
            left.send(()).await.unwrap();
        }
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send([UPGRADE, "early"].concat()).await;
    eventually("the request has arrived", || backend.connections() == 1).await;
    drop(client);
    in_time("the upstream connection ends", gone.recv()).await.unwrap();
    assert!(steer.streams.is_empty());
}

#[tokio::test]
async fn an_upgrade_follows_polls_on_the_same_connection_to_the_same_endpoint() {
    let answer = |mut client: super::support::Client| async move {
        while let Some(head) = client.try_head().await {
            if head.to_lowercase().contains("upgrade: websocket") {
                client.send([SWITCH, "ws"].concat()).await;
                client.rest().await.ok();
            } else {
                client.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\npoll").await;
            }
        }
    };
    let backends = [Backend::start(answer).await, Backend::start(answer).await];
    let addresses = backends.each_ref().map(|backend| backend.address);
    let steer = Setup::new(&addresses).start().await;
    let mut client = steer.client().await;
    let poll = "GET /poll HTTP/1.1\r\nHost: t\r\nX-Forwarded-For: 198.51.100.7\r\n\r\n";
    client.send([poll, poll, UPGRADE].concat()).await;
    for _ in 0..2 {
        assert_eq!(client.response().await.1, "poll");
    }
    assert_eq!(status(&client.head().await), "101");
    assert_eq!(client.exactly(2).await, b"ws");
    let used = backends.iter().find(|backend| backend.connections() > 0).unwrap();
    assert_eq!(used.connections(), 2, "one connection of the pool, one for the stream");
    assert_eq!(steer.streams.snapshot()[0].info.endpoint, used.address);
}
