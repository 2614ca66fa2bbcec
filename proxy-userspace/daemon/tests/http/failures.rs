//! What a client receives when the cluster fails.

use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use super::support::{Backend, Client, Setup, eventually, header, in_time, status};

const GET: &str = "GET / HTTP/1.1\r\nHost: t\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\nhi";
const UPGRADE: &str =
    "GET / HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";

/// An address on which nobody listens.
async fn closed_port() -> std::net::SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// Sends each kind of request and expects the same answer to all of them.
async fn expect(setup: impl Fn() -> Setup, code: &str, kind: &str) {
    for request in [GET, POST, UPGRADE] {
        let steer = setup().start().await;
        let mut client = steer.client().await;
        client.send(request).await;
        let (head, body) = client.response().await;
        assert_eq!(status(&head), code, "{kind}, {request:?}: {body}");
        assert_eq!(header(&head, "content-type"), Some("text/plain; charset=utf-8"));
        assert_eq!(steer.faults(kind), 1, "{request:?}: {}", steer.all_faults());
        assert_eq!(steer.requests("c", code), 1, "{request:?}");
        if request == UPGRADE {
            assert_eq!(header(&head, "connection"), Some("close"));
            assert_eq!(client.rest().await.unwrap(), b"");
        } else {
            // The client's connection can still be used.
            client.send(request).await;
            assert_eq!(status(&client.response().await.0), code);
        }
    }
}

#[tokio::test]
async fn nobody_listens() {
    let address = closed_port().await;
    expect(|| Setup::new(&[address]), "502", "connect_refused").await;
}

#[tokio::test]
async fn there_is_no_endpoint() {
    expect(|| Setup::new(&[]), "503", "no_healthy_endpoint").await;
}

#[tokio::test]
async fn connecting_hangs() {
    // The kernel drops further SYNs when the accept queue is full.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let mut fillers = Vec::new();
    while let Ok(filler) = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await
    {
        fillers.push(filler.unwrap());
        assert!(fillers.len() < 10, "the accept queue never fills");
    }
    let setup = || Setup { connect_timeout: Duration::from_millis(100), ..Setup::new(&[address]) };
    expect(setup, "504", "connect_timeout").await;
    let steer = setup().start().await;
    let mut client = steer.client().await;
    client.send(GET).await;
    client.response().await;
    assert_eq!(steer.connects("timeout"), 1);
}

#[tokio::test]
async fn the_endpoint_never_answers() {
    let backend = Backend::start(|mut client| async move {
        client.try_head().await;
        std::future::pending::<()>().await;
    })
    .await;
    let setup = || Setup { timeout: Some(Duration::from_millis(100)), ..Setup::new(&[backend.address]) };
    expect(setup, "504", "response_timeout").await;
}

#[tokio::test]
async fn the_endpoint_closes_before_it_answers() {
    for partial in ["", "HTTP/1.1 200 OK\r\ncontent-le"] {
        let backend = Backend::start(move |mut client| async move {
            client.try_head().await;
            client.send(partial).await;
        })
        .await;
        expect(|| Setup::new(&[backend.address]), "502", "endpoint_closed").await;
    }
}

#[tokio::test]
async fn the_endpoint_answers_garbage() {
    for garbage in [
        &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3, 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        // Nothing has been sent to the client when the chunk is read.
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
    ] {
        let backend = Backend::canned(garbage).await;
        let setup = || Setup { timeout: Some(Duration::from_secs(3)), ..Setup::new(&[backend.address]) };
        expect(setup, "502", "endpoint_protocol").await;
    }
}

#[tokio::test]
async fn a_switch_that_nobody_asked_for() {
    let backend =
        Backend::canned(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
            .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    for n in 1..=2 {
        client.send(GET).await;
        assert_eq!(status(&client.response().await.0), "502");
        assert_eq!(steer.faults("unasked_switch"), n);
    }
}

#[tokio::test]
async fn a_response_that_breaks_off_does_not_look_complete() {
    for (response, http) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", "1.1"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n", "1.1"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n", "1.0"),
    ] {
        let (give_up, gave_up) = tokio::sync::watch::channel(false);
        let backend = Backend::start(move |mut client| {
            let mut gave_up = gave_up.clone();
            async move {
                client.try_head().await;
                client.send(response).await;
                gave_up.wait_for(|up| *up).await.unwrap();
            }
        })
        .await;
        let mut setup = Setup::new(&[backend.address]);
        setup.options.accept_http_10 = true;
        let steer = setup.start().await;
        let mut client = steer.client().await;
        client.send(format!("GET / HTTP/{http}\r\nHost: t\r\n\r\n")).await;
        let head = client.head().await;
        assert_eq!(status(&head), "200");
        let body = if head.contains("chunked") { "4\r\nhalf\r\n" } else { "half" };
        assert_eq!(client.exactly(body.len()).await, body.as_bytes());
        give_up.send(true).unwrap();
        match client.rest().await {
            Ok(rest) => {
                assert_eq!(rest, b"");
                assert_eq!(http, "1.1", "a body that ends with the connection must end with a reset");
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        eventually("counted", || steer.faults("response_broken") == 1).await;
    }
}

#[tokio::test]
async fn an_idle_connection_that_the_endpoint_closed_is_not_used_again() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    for _ in 0..20 {
        client.send(GET).await;
        assert_eq!(status(&client.response().await.0), "200");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(backend.connections(), 20);
    assert_eq!(steer.connects("ok"), 20);
}

#[tokio::test]
async fn an_early_answer_reaches_a_client_that_is_still_sending() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.1 413 Content Too Large\r\ncontent-length: 3\r\n\r\nbig").await;
        client.rest().await.ok();
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\nsome").await;
    let (head, body) = client.response().await;
    assert_eq!((status(&head), body.as_str()), ("413", "big"));
}

#[tokio::test]
async fn no_route_is_404() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client: Client = steer.client().await;
    client.send("OPTIONS * HTTP/1.1\r\nHost: t\r\n\r\n").await;
    let (head, _) = in_time("an answer", client.response()).await;
    assert!(matches!(status(&head), "400" | "404"), "{head}");
}
