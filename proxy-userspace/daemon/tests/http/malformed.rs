//! Requests that two parsers could understand differently. For each one the client receives an
//! answer, the connection is closed, nothing reaches the backend, and the cause is counted.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::support::{Backend, Setup, eventually, header, in_time, status};

const SOUND: &str = "GET /second HTTP/1.1\r\nHost: t\r\n\r\n";

#[tokio::test]
async fn each_shape_has_its_answer() {
    let long = format!("GET / HTTP/1.1\r\nHost: t\r\nA: {}\r\n\r\n", "a".repeat(61 * 1024));
    let many = format!("GET / HTTP/1.1\r\nHost: t\r\n{}\r\n", "A: b\r\n".repeat(100));
    let target = format!("GET /{} HTTP/1.1\r\nHost: t\r\n\r\n", "a".repeat(65 * 1024));
    let table: &[(&str, &str, &str)] = &[
        ("GET / HTTP/1.1\nHost: t\n\n", "400", "bare_lf"),
        ("GET / HTTP/1.1\r\nHost: t\n\r\n", "400", "bare_lf"),
        ("GET / HTTP/1.1\r\nHost: t\r\nA: b\nTransfer-Encoding: chunked\r\n\r\n", "400", "bare_lf"),
        ("GET / HTTP/1.1\r\nHost: t\r\n\n", "400", "bare_lf"),
        ("\nGET / HTTP/1.1\r\nHost: t\r\n\r\n", "400", "bare_lf"),
        ("GET / HTTP/1.1\r\nHost: t\r\nA: b\rTransfer-Encoding: chunked\r\n\r\n", "400", "bare_cr"),
        ("GET / HTTP/1.1\rHost: t\r\n\r\n", "400", "bare_cr"),
        ("GET / HTTP/1.1\r\nHost: t\r\r\n\r\n", "400", "bare_cr"),
        ("GET / HTTP/1.1\r\nHost: t\r\nA: b\0c\r\n\r\n", "400", "nul"),
        ("GET / HTTP/1.1\r\nHost: t\r\nA: b\r\n folded\r\n\r\n", "400", "obs_fold"),
        ("GET / HTTP/1.1\r\n Host: t\r\n\r\n", "400", "obs_fold"),
        ("GET / HTTP/1.1\r\nHost : t\r\n\r\n", "400", "space_before_colon"),
        ("GET / HTTP/1.1\r\nHost: t\r\nContent-Length\t: 4\r\n\r\nabcd", "400", "space_before_colon"),
        ("GET / HTTP/1.1\r\nHost: t\r\nno colon\r\n\r\n", "400", "header_line"),
        ("GET / HTTP/1.1\r\nHost: t\r\nA\x01: b\r\n\r\n", "400", "header_line"),
        ("GET / HTTP/1.1\r\nHost: t\r\nA: \x7f\r\n\r\n", "400", "header_line"),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "400",
            "length_and_encoding",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
            "400",
            "length_and_encoding",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
            "400",
            "content_length",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
            "400",
            "content_length",
        ),
        ("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 4, 4\r\n\r\nabcd", "400", "content_length"),
        ("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: +4\r\n\r\nabcd", "400", "content_length"),
        ("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: -4\r\n\r\nabcd", "400", "content_length"),
        ("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 0x4\r\n\r\nabcd", "400", "content_length"),
        ("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 4 4\r\n\r\nabcd", "400", "content_length"),
        ("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: \r\n\r\nabcd", "400", "content_length"),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "400",
            "content_length",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            "400",
            "transfer_encoding",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            "400",
            "transfer_encoding",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
            "400",
            "transfer_encoding",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
            "400",
            "transfer_encoding",
        ),
        (
            "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "400",
            "transfer_encoding",
        ),
        (
            "POST / HTTP/1.0\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "400",
            "transfer_encoding",
        ),
        ("GET /a#b HTTP/1.1\r\nHost: t\r\n\r\n", "400", "fragment_in_target"),
        ("GET / HTTP/1.1\r\nHost: t\r\nHost: u\r\n\r\n", "400", "repeated_host"),
        ("GET /a b HTTP/1.1\r\nHost: t\r\n\r\n", "400", "request_line"),
        ("GET / HTTP/2.0\r\nHost: t\r\n\r\n", "400", "request_line"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400", "request_line"),
        ("GET\r\nHost: t\r\n\r\n", "400", "request_line"),
        ("\x16\x03\x01\x02\x00\r\n\r\n", "400", "nul"),
        ("GET / HTTP/1.1\r\n\r\n", "400", "missing_host"),
        ("GET / HTTP/1.0\r\nHost: t\r\n\r\n", "426", "http_10"),
        ("CONNECT t:80 HTTP/1.1\r\nHost: t\r\n\r\n", "400", "bad_target"),
        (&long, "431", "head_too_long"),
        (&many, "431", "too_many_headers"),
        (&target, "431", "head_too_long"),
    ];
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    for &(request, code, kind) in table {
        let shown: String = request.chars().take(120).collect();
        let before = steer.faults(kind);
        let counted = steer.requests("", code);
        let mut client = steer.client().await;
        client.send([request, SOUND].concat()).await;
        let (head, body) = client.response().await;
        assert_eq!(status(&head), code, "{shown:?}: {head}{body}");
        assert_eq!(header(&head, "connection"), Some("close"), "{shown:?}: {head}");
        assert_eq!(client.rest().await.unwrap(), b"", "{shown:?}");
        assert_eq!(header(&head, "server"), Some("steer"));
        assert!(!body.trim().is_empty(), "{shown:?} says why");
        assert_eq!(steer.faults(kind), before + 1, "{shown:?}: {}", steer.all_faults());
        assert_eq!(steer.requests("", code), counted + 1, "{shown:?}");
        assert_eq!(backend.heads(), Vec::<String>::new(), "{shown:?}");
    }
}

#[tokio::test]
async fn a_long_target_is_414_where_long_heads_are_allowed() {
    let backend = Backend::echo().await;
    let mut setup = Setup::new(&[backend.address]);
    setup.options.max_request_headers_bytes = 256 * 1024;
    let steer = setup.start().await;
    let mut client = steer.client().await;
    client.send(format!("GET /{} HTTP/1.1\r\nHost: t\r\n\r\n", "a".repeat(65 * 1024))).await;
    assert_eq!(status(&client.last_response().await.0), "414");
    assert_eq!(steer.faults("target_too_long"), 1);

    let mut client = steer.client().await;
    client.send(format!("GET / HTTP/1.1\r\nHost: t\r\nA: {}\r\n\r\n", "a".repeat(200 * 1024))).await;
    assert_eq!(status(&client.response().await.0), "200");
}

#[tokio::test]
async fn the_request_before_a_malformed_one_is_answered_first() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    client.send("GET /one HTTP/1.1\r\nHost: t\r\n\r\nGET /two HTTP/1.1\nHost: t\r\n\r\n").await;
    assert_eq!(status(&client.response().await.0), "200");
    assert_eq!(status(&client.last_response().await.0), "400");
    let heads = backend.heads();
    assert_eq!(heads.len(), 1);
    assert!(heads[0].starts_with("GET /one "));
}

#[tokio::test]
async fn a_bad_chunk_aborts_the_request() {
    for chunk in [
        "zz\r\n",
        "4\nabcd\r\n",
        "4\r\nabcdX\r\n",
        "4 \r\nabcd\r\n",
        "\r\n",
        "4;\n",
        "1000000000000000\r\n",
        "-1\r\n",
    ] {
        // Receives how the request's body ended.
        let (ended, mut end) = tokio::sync::mpsc::channel(1);
        let backend = Backend::start(move |mut client| {
            let ended = ended.clone();
            async move {
                client.head().await;
                ended.send(client.rest().await.unwrap_or_default()).await.unwrap();
            }
        })
        .await;
        let steer = Setup::new(&[backend.address]).start().await;
        let mut client = steer.client().await;
        client.send("POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n").await;
        // Otherwise the endpoint hears nothing of the request.
        eventually("the request has arrived", || backend.connections() == 1).await;
        client.send(chunk).await;
        client.send("0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: t\r\n\r\n").await;
        let (head, body) = client.response().await;
        assert_eq!(status(&head), "400", "{chunk:?}: {body}");
        assert_eq!(client.rest().await.unwrap(), b"");
        let got = in_time("the endpoint's end", end.recv()).await.unwrap();
        let got = String::from_utf8_lossy(&got);
        assert!(!got.contains("0\r\n\r\n") && !got.contains("smuggled"), "{chunk:?}: {got:?}");
        assert_eq!(steer.faults("chunk"), 1, "{chunk:?}: {}", steer.all_faults());
    }
}

#[tokio::test]
async fn targets_and_hosts_that_name_nothing_are_refused() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let targets = ["http://[::1/", "http:///x", "://", "*", "https://t/", "http://u:p@t/"];
    for (n, target) in (1..).zip(targets) {
        let mut client = steer.client().await;
        client.send(format!("GET {target} HTTP/1.1\r\nHost: t\r\n\r\n{SOUND}")).await;
        assert_eq!(status(&client.last_response().await.0), "400", "{target:?}");
        assert_eq!(steer.faults("bad_target"), n, "{target:?}");
    }
    // RFC 9112, 3.2: such a value must be answered with 400.
    let hosts: [&[u8]; 8] = [b"a b", b"a, b", b"a/b?c", b"a@b", b"\xff", b"a:b:c", b"[::1", b"<script>"];
    for (n, host) in (1..).zip(hosts) {
        let mut client = steer.client().await;
        client.send([b"GET / HTTP/1.1\r\nHost: ", host, b"\r\n\r\n", SOUND.as_bytes()].concat()).await;
        assert_eq!(status(&client.last_response().await.0), "400", "{host:?}");
        assert_eq!(steer.faults("bad_host"), n, "{host:?}");
    }
    assert_eq!(steer.requests("", "400"), (targets.len() + hosts.len()) as u64);
    assert_eq!(backend.heads(), Vec::<String>::new());
}

/// Sends valid requests with a few bytes changed, cut anywhere. No task panics, and every
/// connection ends.
#[tokio::test]
async fn damaged_requests_never_panic() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let in_a_test = info.location().is_some_and(|at| at.file().contains("tests/http/"));
        PANICS.fetch_add(usize::from(!in_a_test), Ordering::SeqCst);
        usual(info);
    }));
    let backend = Backend::start(|mut client| async move {
        while client.try_head().await.is_some() {
            let response = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
            if client.socket.write_all(response.as_bytes()).await.is_err() {
                break;
            }
        }
    })
    .await;
    let mut setup = Setup::new(&[backend.address]);
    setup.options.accept_http_10 = true;
    setup.options.idle_timeout = Some(Duration::from_millis(50));
    setup.options.request_headers_timeout = Some(Duration::from_millis(50));
    setup.timeout = Some(Duration::from_millis(50));
    let steer = setup.start().await;
    let seeds = [
        "GET /a?b HTTP/1.1\r\nHost: t\r\nConnection: keep-alive\r\nCookie: a=b\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n3;a=b\r\nabc\r\n0\r\nX: y\r\n\r\n",
        "PUT / HTTP/1.0\r\nHost: t\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nabcd",
        "GET http://u:p@t:1/x HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nframes",
    ];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..400 {
        let mut bytes = [seeds[round % seeds.len()], SOUND].concat().into_bytes();
        for _ in 0..random.below(4) {
            let at = random.below(bytes.len());
            match random.below(3) {
                0 => bytes[at] = random.below(256) as u8,
                1 => bytes.insert(at, b"\r\n \t:;,#\0"[random.below(9)]),
                _ => {
                    bytes.remove(at);
                }
            }
        }
        let cut = random.below(bytes.len());
        let mut client = steer.client().await;
        // The proxy may have closed the connection already.
        client.socket.write_all(&bytes[..cut]).await.ok();
        tokio::task::yield_now().await;
        client.socket.write_all(&bytes[cut..]).await.ok();
        client.rest().await.ok();
    }
    drop(backend);
    eventually("all closed", || steer.open_connections() == 0).await;
    assert_eq!(PANICS.load(Ordering::SeqCst), 0);
}

/// splitmix64
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }
}
