//! Bodies that break off, and the lines after bodies.

use std::time::Duration;

use socket2::SockRef;

use super::support::{Backend, Setup, content_length, eventually, header, in_time, status};

const GET: &str = "GET / HTTP/1.1\r\nHost: t\r\n\r\n";
const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

/// Sends `pieces`, a while between them, and then closes the connection, perhaps with a reset.
async fn breaking(pieces: &'static [&'static str], reset: bool) -> Backend {
    Backend::start(move |mut client| async move {
        // A reset drops what Nagle's algorithm holds back.
        client.socket.set_nodelay(true).unwrap();
        client.try_head().await;
        for piece in pieces {
            client.send(piece).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if reset {
            SockRef::from(&client.socket).set_linger(Some(Duration::ZERO)).unwrap();
        }
    })
    .await
}

#[tokio::test]
async fn what_the_endpoint_sent_before_it_broke_off_arrives_and_then_the_cut() {
    const EVENT: &str = "6\r\nevent\n\r\n";
    const LONG: &str = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc";
    for (pieces, reset, body) in [
        (&["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nevent\n\r\n"][..], false, EVENT),
        (&[CHUNKED, EVENT], false, EVENT),
        (&[CHUNKED, EVENT], true, EVENT),
        (&[LONG], false, "abc"),
        (&[LONG], true, "abc"),
    ] {
        let backend = breaking(pieces, reset).await;
        let steer = Setup::new(&[backend.address]).start().await;
        for round in 1..=40 {
            let mut client = steer.client().await;
            client.send(GET).await;
            assert_eq!(status(&client.head().await), "200", "{pieces:?}");
            let rest = client.rest().await.unwrap();
            assert_eq!(String::from_utf8_lossy(&rest), body, "{pieces:?}");
            eventually("counted", || steer.faults("response_broken") == round).await;
        }
    }
}

#[tokio::test]
async fn bad_ends_of_a_chunked_request_are_bad_chunks() {
    let backend = Backend::start(|mut client| async move {
        client.rest().await.ok();
    })
    .await;
    let line = "X-A: b\r\n";
    for (end, n) in [
        (format!("0\r\nX-A: {}\r\n\r\n", "b".repeat(40_000)), 1),
        (format!("0\r\n{}\r\n", line.repeat(3000)), 2),
        ("0\r\nno colon\r\n\r\n".to_owned(), 3),
        (format!("3;{}\r\nabc\r\n0\r\n\r\n", "a".repeat(20_000)), 4),
    ] {
        let steer = Setup::new(&[backend.address]).start().await;
        let mut client = steer.client().await;
        client.send("POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
        client.send(&end).await;
        let (head, body) = client.last_response().await;
        assert_eq!((status(&head), steer.faults("chunk")), ("400", 1), "{n}: {body}");
        assert_eq!(steer.faults("client_gone"), 0);
    }
}

/// As if they were lines of the head: the endpoint may take them for such.
#[tokio::test]
async fn trailer_lines_are_sanitised_like_a_head() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        let body = client.until("0\r\n").await + &client.head().await;
        let trailers = "X-Envoy-Internal: true\r\nSet-Cookie: a=b\r\nX-Sum: 2\r\n\r\n";
        client.send(format!("{CHUNKED}{:x}\r\n{body}\r\n0\r\n{trailers}", body.len())).await;
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client
        .send(concat!(
            "POST / HTTP/1.1\r\nHost: t\r\nTE: trailers\r\nTrailer: X-Forwarded-For\r\n",
            "Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX-Forwarded-For: 9.9.9.9\r\n",
            "X-Envoy-Internal: true\r\nContent-Length: 3\r\nX-Sum: 1\r\n\r\n"
        ))
        .await;
    client.head().await;
    let answer = client.until("x-sum: 2\r\n\r\n").await;
    assert!(answer.contains("3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"), "{answer}");
    assert!(answer.ends_with("0\r\nx-sum: 2\r\n\r\n"), "{answer}");
}

/// An idempotent request that meets a kept connection which the endpoint closes just then is sent
/// again. One that is not gets an answer that says so.
#[tokio::test]
async fn a_get_never_meets_the_end_of_a_kept_connection() {
    // Closes each connection without an answer when the second request comes.
    let backend = Backend::start(|mut client| async move {
        client.try_head().await;
        client.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        client.try_head().await;
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    for _ in 0..20 {
        client.send(GET).await;
        assert_eq!(status(&client.response().await.0), "200");
    }
    client.send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\nhi").await;
    assert_eq!(status(&client.response().await.0), "502");
    assert_eq!(steer.faults("endpoint_closed"), 1);
}

#[tokio::test]
async fn a_client_that_half_closes_takes_its_request_along_and_is_counted() {
    let backend = Backend::start(|mut client| async move {
        client.head().await;
        client.rest().await.ok();
    })
    .await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send(GET).await;
    tokio::io::AsyncWriteExt::shutdown(&mut client.socket).await.unwrap();
    assert_eq!(client.rest().await.unwrap(), b"");
    eventually("counted", || steer.faults("client_gone") == 1).await;
}

#[tokio::test]
async fn targets_go_on_byte_for_byte() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let targets: [&[u8]; 8] = [
        b"/?filter={\"a\":1}",
        b"/?q=<b>",
        b"/<b>",
        b"/a`b",
        b"/\xe9",
        "/\u{e9}".as_bytes(),
        b"/a\"b?c|d^e\\f",
        b"//a/./../b;c%2F%zz",
    ];
    let mut client = steer.client().await;
    for target in targets {
        client.send([b"GET ", target, b" HTTP/1.1\r\nHost: t\r\n\r\n"].concat()).await;
        assert_eq!(status(&client.response().await.0), "200", "{target:?}");
    }
    let seen = backend.heads();
    for (target, head) in targets.iter().zip(&seen) {
        let line = format!("GET {} HTTP/1.1\r\n", String::from_utf8_lossy(target));
        assert!(head.starts_with(&line), "{head}");
    }
}

#[tokio::test]
async fn header_names_can_keep_the_spelling_of_their_sender() {
    for preserve_case in [false, true] {
        let backend = Backend::start(|mut client| async move {
            let head = client.head().await;
            let response =
                format!("HTTP/1.1 200 OK\r\nETag: x\r\nContent-Length: {}\r\n\r\n{head}", head.len());
            client.send(response).await;
        })
        .await;
        let mut setup = Setup::new(&[backend.address]);
        setup.options.preserve_case = preserve_case;
        let steer = setup.start().await;
        let mut client = steer.client().await;
        client.send("GET / HTTP/1.1\r\nHost: t\r\nX-CamelCase: 1\r\n\r\n").await;
        let (head, seen) = in_time("a response", client.response()).await;
        assert!(content_length(&head).is_some() && header(&head, "etag") == Some("x"));
        let spelt = |text: &str, camel: &str| text.contains(camel) == preserve_case;
        assert!(spelt(&seen, "\r\nX-CamelCase: 1\r\n") && spelt(&seen, "\r\nHost: t\r\n"), "{seen}");
        assert!(spelt(&head, "\r\nETag: x\r\n") && spelt(&head, "\r\nContent-Length: "), "{head}");
    }
}
