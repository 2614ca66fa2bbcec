//! Slow clients and slow endpoints.

use std::time::{Duration, Instant};

use tokio::net::TcpSocket;

use super::support::{Backend, Client, Setup, eventually, header, in_time, status};

const SHORT: Duration = Duration::from_millis(150);

#[tokio::test]
async fn a_head_that_trickles_is_cut_off() {
    let backend = Backend::echo().await;
    let mut setup = Setup::new(&[backend.address]);
    setup.options.request_headers_timeout = Some(SHORT);
    let steer = setup.start().await;
    let mut client = steer.client().await;
    // Sends a request first. The time limit counts from the first byte of a head, not from the
    // start of the connection.
    client.send("GET / HTTP/1.1\r\nHost: t\r\n\r\n").await;
    client.response().await;
    tokio::time::sleep(SHORT * 2).await;

    let started = Instant::now();
    let trickle = async {
        for byte in b"GET / HTTP/1.1\r\nHost: t\r\nA: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb" {
            client.send([*byte]).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
            if started.elapsed() > SHORT * 2 {
                break;
            }
        }
    };
    trickle.await;
    let (head, body) = client.last_response().await;
    assert_eq!(status(&head), "408", "{body}");
    assert_eq!(header(&head, "connection"), Some("close"));
    assert_eq!(steer.faults("head_timeout"), 1);
    assert_eq!(backend.heads().len(), 1);
    eventually("closed", || steer.open_connections() == 0).await;
}

#[tokio::test]
async fn a_head_that_waits_behind_a_long_poll_is_not_counted() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        tokio::time::sleep(SHORT * 3).await;
        client.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\npoll").await;
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nnext").await;
    })
    .await;
    let mut setup = Setup::new(&[backend.address]);
    setup.options.request_headers_timeout = Some(SHORT);
    setup.options.idle_timeout = Some(SHORT);
    let steer = setup.start().await;
    let mut client = steer.client().await;
    client.send("GET / HTTP/1.1\r\nHost: t\r\n\r\nGET / HT").await;
    assert_eq!(client.response().await.1, "poll");
    client.send("TP/1.1\r\nHost: t\r\n\r\n").await;
    assert_eq!(client.response().await.1, "next");
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let backend = Backend::echo().await;
    let mut setup = Setup::new(&[backend.address]);
    setup.options.idle_timeout = Some(SHORT);
    let steer = setup.start().await;
    // One client that sends nothing, one that has sent a request, one that sends empty lines.
    let mut silent = steer.client().await;
    let mut idle = steer.client().await;
    let mut blank = steer.client().await;
    idle.send("GET / HTTP/1.1\r\nHost: t\r\n\r\n").await;
    idle.response().await;
    blank.send("\r\n\r\n").await;
    for client in [&mut silent, &mut idle, &mut blank] {
        assert_eq!(client.rest().await.unwrap(), b"");
    }
    drop((silent, idle, blank));
    eventually("closed", || steer.open_connections() == 0).await;
    assert_eq!(steer.all_faults(), "", "an idle connection is no fault");
}

#[tokio::test]
async fn a_body_that_stalls_is_the_clients_fault() {
    let backend = Backend::echo().await;
    for request in [
        "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nsome",
        "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n",
    ] {
        let steer = Setup { timeout: Some(SHORT), ..Setup::new(&[backend.address]) }.start().await;
        let mut client = steer.client().await;
        client.send(request).await;
        let (head, body) = client.last_response().await;
        assert_eq!(status(&head), "408", "{body}");
        assert_eq!(steer.faults("body_timeout"), 1, "{}", steer.all_faults());
    }
}

#[tokio::test]
async fn a_long_upload_is_no_slow_endpoint() {
    let backend = Backend::echo().await;
    let steer = Setup { timeout: Some(SHORT), ..Setup::new(&[backend.address]) }.start().await;
    let mut client = steer.client().await;
    client.send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 20\r\n\r\n").await;
    for _ in 0..20 {
        tokio::time::sleep(SHORT / 5).await;
        client.send("x").await;
    }
    let (head, body) = client.response().await;
    assert_eq!((status(&head), body.split(' ').nth(1)), ("200", Some("xxxxxxxxxxxxxxxxxxxx")));
}

#[tokio::test]
async fn a_stream_timeout_before_the_response_is_408_and_after_it_a_cut() {
    let backend = Backend::start(|mut client| async move {
        while let Some(head) = client.try_head().await {
            if head.starts_with("GET /body ") {
                client.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
            }
        }
    })
    .await;
    let mut setup = Setup::new(&[backend.address]);
    setup.options.stream_idle_timeout = Some(SHORT);
    let steer = setup.start().await;
    let mut client = steer.client().await;
    client.send("GET / HTTP/1.1\r\nHost: t\r\n\r\n").await;
    assert_eq!(status(&client.last_response().await.0), "408");
    assert_eq!(steer.faults("stream_idle"), 1);

    let mut client = steer.client().await;
    client.send("GET /body HTTP/1.1\r\nHost: t\r\n\r\n").await;
    client.head().await;
    assert_eq!(client.exactly(4).await, b"half");
    let end = client.rest().await;
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(steer.faults("stream_idle"), 2);
}

#[tokio::test]
async fn a_body_that_moves_is_not_idle() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        client.send("HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n").await;
        for _ in 0..20 {
            tokio::time::sleep(SHORT / 5).await;
            client.send("x").await;
        }
    })
    .await;
    let mut setup = Setup { timeout: Some(SHORT), ..Setup::new(&[backend.address]) };
    setup.options.stream_idle_timeout = Some(SHORT);
    let steer = setup.start().await;
    let mut client = steer.client().await;
    client.send("GET / HTTP/1.1\r\nHost: t\r\n\r\n").await;
    assert_eq!(in_time("the whole response", client.response()).await.1.len(), 20);
}

#[tokio::test]
async fn a_client_that_does_not_read_its_response_is_cut_off_in_the_end() {
    let backend = Backend::start(|mut client| async move {
        let head = client.head().await;
        let len: usize = header(&head, "x-length").unwrap().parse().unwrap();
        client.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\n\r\n")).await;
        client.send(vec![b'x'; len]).await;
    })
    .await;
    let mut setup = Setup { small_send_buffers: true, ..Setup::new(&[backend.address]) };
    setup.options.idle_timeout = Some(SHORT);
    setup.options.stream_idle_timeout = Some(SHORT);
    let steer = setup.start().await;
    // When the client stalls, the kernel has all of some responses and a part of others. For some
    // responses, the proxy has not received the end yet.
    let mut clients = Vec::new();
    for len in (0..60).map(|n| n * 4096) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(1).unwrap();
        let mut client = Client::from(socket.connect(steer.address).await.unwrap());
        client.send(format!("GET / HTTP/1.1\r\nHost: t\r\nX-Length: {len}\r\n\r\n")).await;
        clients.push(client);
    }
    eventually("accepted", || steer.open_connections() == 60).await;
    eventually("closed", || steer.open_connections() == 0).await;
    let cut = steer.faults("stream_idle");
    assert!((1..60).contains(&cut), "{cut} cut off");
}
