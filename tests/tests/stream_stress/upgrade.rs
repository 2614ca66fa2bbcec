//! The HTTP of a stream. The tests write it themselves, so that they choose the bytes in the
//! segment of a head.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

/// A request for an upgrade. `name` tells the backend what to do. `client` is the hash key.
pub(crate) fn request(name: &str, proxy: SocketAddr, client: u32) -> String {
    let [.., a, b, c] = client.to_be_bytes();
    format!(
        "GET /{name} HTTP/1.1\r\n\
         Host: {proxy}\r\n\
         X-Forwarded-For: 10.{a}.{b}.{c}\r\n\
         Connection: Upgrade\r\n\
         Upgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

pub(crate) const RESPONSE: &str = "HTTP/1.1 101 Switching Protocols\r\n\
     Connection: Upgrade\r\n\
     Upgrade: websocket\r\n\
     Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Reads a head. The second value is what follows the head in the same segment.
pub(crate) async fn read_head(stream: &mut TcpStream) -> Result<(String, Vec<u8>)> {
    const MAX_HEAD: usize = 16 * 1024;
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let surplus = bytes.split_off(end + 4);
            return Ok((String::from_utf8(bytes).context("the head is not valid UTF-8")?, surplus));
        }
        anyhow::ensure!(bytes.len() < MAX_HEAD, "a head does not end");
        let read = stream.read_buf(&mut bytes).await.context("reading a head")?;
        anyhow::ensure!(read > 0, "the connection ends in a head");
    }
}

/// The name of the stream in a request.
pub(crate) fn name_of(head: &str) -> Option<&str> {
    head.strip_prefix("GET /")?.split(' ').next()
}

/// # Errors
/// When the head is not a 101; the error has the head.
pub(crate) fn ensure_switched(head: &str) -> Result<()> {
    anyhow::ensure!(head.starts_with("HTTP/1.1 101 "), "no upgrade: {head}");
    Ok(())
}
