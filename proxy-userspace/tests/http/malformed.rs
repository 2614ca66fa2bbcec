//! Requests that two parsers could understand differently: each gets its answer, the connection is
//! closed, nothing reaches the backend, and the cause is counted.

use super::support::{Backend, Setup, header, status};

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
        // Tells how the request's body ended.
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
        client.send(chunk).await;
        client.send("0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: t\r\n\r\n").await;
        let (head, body) = client.response().await;
        assert_eq!(status(&head), "400", "{chunk:?}: {body}");
        assert_eq!(client.rest().await.unwrap(), b"");
        let got = end.recv().await.unwrap();
        let got = String::from_utf8_lossy(&got);
        assert!(!got.contains("0\r\n\r\n") && !got.contains("smuggled"), "{chunk:?}: {got:?}");
        assert_eq!(steer.faults("chunk"), 1, "{chunk:?}: {}", steer.all_faults());
    }
}
