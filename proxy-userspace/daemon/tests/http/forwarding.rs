//! Ordinary requests.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use steer::http::Phase;

use super::support::{Backend, Client, Setup, content_length, eventually, header, in_time, status};

fn get(path: &str, client: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: t\r\nX-Forwarded-For: {client}\r\n\r\n")
}

#[tokio::test]
async fn each_request_of_a_connection_goes_by_its_own_key() {
    let backends = [Backend::echo().await, Backend::echo().await, Backend::echo().await];
    let addresses = backends.each_ref().map(|backend| backend.address);
    let steer = Setup::new(&addresses).start().await;
    let mut one = steer.client().await;
    let mut used = std::collections::HashSet::new();
    for key in 0..60 {
        let key = format!("198.51.100.{key}");
        one.send(get("/", &key)).await;
        let first = one.response().await.1;
        let mut other = steer.client().await;
        other.send(get("/", &key)).await;
        assert_eq!(first, other.response().await.1, "{key}");
        used.insert(first);
    }
    assert_eq!(used.len(), 3);
    assert_eq!(steer.requests("c", "200"), 120);
    drop(one);
    eventually("connections gone", || steer.open_connections() == 0).await;
    let reused: usize = backends.iter().map(Backend::connections).sum();
    assert!(reused < 30, "120 requests took {reused} connections");
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order_however_they_are_cut() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let requests = concat!(
        "POST /1 HTTP/1.1\r\nHost: t\r\nContent-Length: 3\r\n\r\none",
        "\r\n",
        "GET /2 HTTP/1.1\r\nHost: t\r\n\r\n",
        "POST /3 HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nthr\r\n2\r\nee\r\n0\r\n\r\n",
        "HEAD /4 HTTP/1.1\r\nHost: t\r\n\r\n",
        "GET /5 HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n"
    )
    .as_bytes();
    for cut in 0..requests.len() {
        let mut client = steer.client().await;
        client.send(&requests[..cut]).await;
        if cut % 8 == 0 {
            // Lets the first part arrive alone.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        client.send(&requests[cut..]).await;
        for body in ["one", "", "three"] {
            let (head, got) = client.response().await;
            assert_eq!(status(&head), "200", "cut at {cut}");
            assert_eq!(got.split(' ').nth(1), Some(body), "cut at {cut}");
        }
        let head = client.head().await;
        assert!(content_length(&head).unwrap() > 0, "HEAD answers with the length of GET's body: {head}");
        let (head, got) = client.last_response().await;
        assert_eq!(header(&head, "connection"), Some("close"));
        assert_eq!(got.split(' ').nth(1), Some(""), "cut at {cut}");
    }
}

#[tokio::test]
async fn what_the_backend_and_the_client_see() {
    let backend = Backend::echo().await;
    let mut setup = Setup::new(&[backend.address]);
    setup.options.accept_http_10 = true;
    let steer = setup.start().await;
    let mut client = steer.client().await;
    client
        .send(concat!(
            "GET /a?b HTTP/1.1\r\nHost: Example.COM:81\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\n",
            "Keep-Alive: 5\r\nTE: trailers\r\nExpect: 100-continue\r\nCookie: a=1\r\nCookie: b=2\r\n\r\n"
        ))
        .await;
    let (head, _) = client.response().await;
    assert_eq!(header(&head, "server"), Some("steer"));
    assert!(header(&head, "date").is_some());
    let seen = &backend.heads()[0];
    assert!(seen.starts_with("GET /a?b HTTP/1.1\r\n"), "{seen}");
    assert_eq!(header(seen, "host"), Some("Example.COM:81"));
    for gone in ["connection", "x-hop", "keep-alive", "expect", "transfer-encoding", "content-length"] {
        assert_eq!(header(seen, gone), None, "{seen}");
    }
    assert_eq!(seen.matches("cookie: ").count(), 2, "{seen}");

    // HTTP/1.0 with and without keep-alive. HTTP/1.0 does not know Upgrade.
    let mut client = steer.client().await;
    client
        .send("GET /old HTTP/1.0\r\nHost: t\r\nConnection: keep-alive, upgrade\r\nUpgrade: websocket\r\n\r\n")
        .await;
    assert_eq!(header(&client.response().await.0, "connection"), Some("keep-alive"));
    client.send("GET /old HTTP/1.0\r\nHost: t\r\n\r\n").await;
    client.last_response().await;
    assert!(backend.heads()[1].starts_with("GET /old HTTP/1.1\r\n"), "{:?}", backend.heads());
}

#[tokio::test]
async fn statuses_without_a_body() {
    for response in [
        &b"HTTP/1.1 204 No Content\r\n\r\n"[..],
        b"HTTP/1.1 304 Not Modified\r\ncontent-length: 7\r\netag: x\r\n\r\n",
    ] {
        let backend = Backend::canned(response).await;
        let steer = Setup::new(&[backend.address]).start().await;
        let mut client = steer.client().await;
        for _ in 0..2 {
            client.send(get("/", "1")).await;
            let head = client.head().await;
            assert!(matches!(status(&head), "204" | "304"));
            assert_eq!(header(&head, "transfer-encoding"), None);
            assert_eq!(content_length(&head), None);
        }
    }
}

#[tokio::test]
async fn a_length_that_the_framing_beats_is_not_passed_on() {
    let backend = Backend::canned(
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    )
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    for _ in 0..2 {
        client.send(get("/", "1")).await;
        let head = client.head().await;
        assert_eq!(content_length(&head), None);
        assert_eq!(header(&head, "transfer-encoding"), Some("chunked"));
        assert_eq!(client.chunked().await, b"hello");
    }
}

#[tokio::test]
async fn the_client_is_told_to_continue_when_its_body_is_wanted() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send("PUT / HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n").await;
    assert_eq!(client.head().await, "HTTP/1.1 100 Continue\r\n\r\n");
    client.send("body").await;
    let (head, body) = client.response().await;
    assert_eq!((status(&head), body.split(' ').nth(1)), ("200", Some("body")));
}

#[tokio::test]
async fn a_get_keeps_its_chunked_body() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send("GET / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n").await;
    assert_eq!(client.response().await.1.split(' ').nth(1), Some("hi"));
    assert_eq!(header(&backend.heads()[0], "transfer-encoding"), Some("chunked"));
}

/// Sends a body that the receiver does not read. The proxy buffers only a little of such a body, so
/// the sender stalls.
async fn sent_until_it_stalls(mut sender: Client, head: &str) -> usize {
    const BODY: usize = 1 << 30;
    sender.send(head.replace("LEN", &BODY.to_string())).await;
    let piece = vec![b'x'; 64 * 1024];
    let mut sent = 0;
    while sent < BODY {
        match tokio::time::timeout(Duration::from_millis(500), sender.socket.write(&piece)).await {
            Ok(Ok(len)) => sent += len,
            Ok(Err(error)) => panic!("{error}"),
            Err(_stalled) => break,
        }
    }
    sent
}

/// What the sockets of two loopback connections hold (tcp_wmem and tcp_rmem), and some for the
/// proxy.
const SOCKET_BUFFERS: usize = 32 * 1024 * 1024;

#[tokio::test]
async fn an_upload_waits_for_a_slow_backend() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        std::future::pending::<()>().await;
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let client = steer.client().await;
    let sent =
        sent_until_it_stalls(client, "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: LEN\r\n\r\n").await;
    assert!(sent < SOCKET_BUFFERS, "{sent} bytes");
}

#[tokio::test]
async fn a_download_waits_for_a_slow_client() {
    let (stalled, mut result) = tokio::sync::mpsc::channel(1);
    let backend = Backend::start(move |mut client| {
        let stalled = stalled.clone();
        async move {
            client.head().await;
            let sent = sent_until_it_stalls(client, "HTTP/1.1 200 OK\r\nContent-Length: LEN\r\n\r\n").await;
            stalled.send(sent).await.unwrap();
        }
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send(get("/", "1")).await;
    let sent = in_time("a stalled download", result.recv()).await.unwrap();
    assert!(sent < SOCKET_BUFFERS, "{sent} bytes");
}

#[tokio::test]
async fn large_bodies_pass_whole_both_ways() {
    const LEN: usize = 8 * 1024 * 1024;
    let body: Vec<u8> = (0..LEN).map(|i| b'a' + (i * 31 % 26) as u8).collect();
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    for chunked in [false, true] {
        let client = steer.client().await;
        let (reader, mut writer) = client.socket.into_split();
        let sent = body.clone();
        let writing = tokio::spawn(async move {
            if chunked {
                writer
                    .write_all(b"POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
                    .await
                    .unwrap();
                for piece in sent.chunks(10_007) {
                    writer.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await.unwrap();
                    writer.write_all(piece).await.unwrap();
                    writer.write_all(b"\r\n").await.unwrap();
                }
                writer.write_all(b"0\r\n\r\n").await.unwrap();
            } else {
                let head = format!("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: {LEN}\r\n\r\n");
                writer.write_all(head.as_bytes()).await.unwrap();
                writer.write_all(&sent).await.unwrap();
            }
            writer
        });
        let writer = in_time("the upload", writing).await.unwrap();
        let mut client = Client::from(reader.reunite(writer).unwrap());
        let (head, got) = client.response().await;
        assert_eq!(status(&head), "200");
        let got = got.split_once(' ').unwrap().1;
        assert!(got.as_bytes() == body, "{} of {LEN} bytes", got.len());
    }
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_request_along() {
    let (left, mut gone) = tokio::sync::mpsc::channel(1);
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
    client.send(get("/", "1")).await;
    eventually("the request has arrived", || backend.connections() == 1).await;
    drop(client);
    in_time("the upstream connection ends", gone.recv()).await.unwrap();
}

#[tokio::test]
async fn leaving_closes_each_connection_with_its_next_response() {
    let backend = Backend::start(|mut client| async move {
        while client.try_head().await.is_some() {
            client.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        }
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let (mut one, mut other) = (steer.client().await, steer.client().await);
    for client in [&mut one, &mut other] {
        client.send(get("/", "1")).await;
        assert_eq!(header(&client.head().await, "connection"), None);
        assert_eq!(client.exactly(2).await, b"ok");
    }
    steer.drain(Phase::Leaving { alone: true });
    // An idle client is not told, so that its next request cannot cross with a close.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(steer.open_connections(), 2);
    for mut client in [one, other] {
        client.send(get("/", "1")).await;
        let (head, body) = client.last_response().await;
        assert_eq!((body.as_str(), header(&head, "connection")), ("ok", Some("close")));
    }
    steer.served().await;
}

#[tokio::test]
async fn draining_ends_idle_connections_and_finishes_requests() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        client.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut fresh = steer.client().await;
    let mut busy = steer.client().await;
    busy.send(get("/", "1")).await;
    eventually("the request has arrived", || backend.connections() == 1).await;
    eventually("both accepted", || steer.open_connections() == 2).await;
    steer.drain(Phase::Stopping);
    assert_eq!(fresh.rest().await.unwrap(), b"");
    let (head, body) = busy.last_response().await;
    assert_eq!((body.as_str(), header(&head, "connection")), ("ok", Some("close")));
    let address = steer.address;
    steer.served().await;
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
