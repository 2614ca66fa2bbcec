//! HTTP heads that may come in pieces.

use anyhow::{Context as _, Result, ensure};
use httparse::{EMPTY_HEADER, Header, Request, Response, Status};

/// More headers than any proxy sends for our messages.
const MAX_HEADERS: usize = 32;
const MAX_BYTES: usize = 16 * 1024;

/// The start of a head whose end has not come yet.
#[derive(Debug, Default)]
pub(crate) struct Partial(Vec<u8>);

impl Partial {
    /// Appends `bytes` to the head. If a request's head is complete, returns the result of `read`
    /// and how many of `bytes` belong to the head. `None` if more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are not HTTP, the head is too long, or `read` fails.
    pub(crate) fn request<T>(
        &mut self,
        bytes: &[u8],
        read: impl FnOnce(&Request<'_, '_>) -> Result<T>,
    ) -> Result<Option<(T, usize)>> {
        self.head(bytes, |whole, headers| {
            let mut request = Request::new(headers);
            Ok(match request.parse(whole).context("the request is not HTTP")? {
                Status::Complete(size) => Some((read(&request)?, size)),
                Status::Partial => None,
            })
        })
    }

    /// The same for a response.
    ///
    /// # Errors
    /// As with [`Self::request`].
    pub(crate) fn response<T>(
        &mut self,
        bytes: &[u8],
        read: impl FnOnce(&Response<'_, '_>) -> Result<T>,
    ) -> Result<Option<(T, usize)>> {
        self.head(bytes, |whole, headers| {
            let mut response = Response::new(headers);
            Ok(match response.parse(whole).context("the answer is not HTTP")? {
                Status::Complete(size) => Some((read(&response)?, size)),
                Status::Partial => None,
            })
        })
    }

    fn head<T>(
        &mut self,
        bytes: &[u8],
        parse: impl for<'a> FnOnce(&'a [u8], &mut [Header<'a>]) -> Result<Option<(T, usize)>>,
    ) -> Result<Option<(T, usize)>> {
        let known = self.0.len();
        if known > 0 {
            self.0.extend_from_slice(bytes);
        }
        let whole = if known == 0 { bytes } else { &self.0 };
        let Some((value, size)) = parse(whole, &mut [EMPTY_HEADER; MAX_HEADERS])? else {
            ensure!(whole.len() < MAX_BYTES, "the head has more than {MAX_BYTES} bytes");
            if known == 0 {
                self.0.extend_from_slice(bytes);
            }
            return Ok(None);
        };
        self.0.clear();
        Ok(Some((value, size - known)))
    }
}

/// The body's size as the head tells it. `None` if the head does not tell it.
///
/// # Errors
/// When the value is not a number, or the body is chunked: no side of the benchmark sends chunks.
pub(crate) fn content_length(headers: &[Header<'_>]) -> Result<Option<usize>> {
    ensure!(value(headers, "transfer-encoding").is_none(), "the body is chunked");
    let Some(length) = value(headers, "content-length") else { return Ok(None) };
    let length = std::str::from_utf8(length).ok().and_then(|it| it.parse().ok());
    Ok(Some(length.context("the content-length is not a number")?))
}

/// The value of the first header of this name.
pub(crate) fn value<'a>(headers: &[Header<'a>], name: &str) -> Option<&'a [u8]> {
    headers.iter().find(|it| it.name.eq_ignore_ascii_case(name)).map(|it| it.value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_end_of_a_head_in_pieces_of_any_size() {
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n";
        let read = |it: &Response<'_, '_>| content_length(it.headers);
        for at in 1..head.len() {
            let mut partial = Partial::default();
            let (first, second) = head.split_at(at);
            assert!(partial.response(first, read).expect("a valid start of a head").is_none());
            let bytes = [second, b"body"].concat();
            let found = partial.response(&bytes, read).expect("a valid head");
            assert_eq!(found, Some((Some(7), second.len())));
            // No bytes of the first head are left for the next one.
            assert_eq!(partial.response(head, read).expect("a valid head"), Some((Some(7), head.len())));
        }
    }

    #[test]
    fn refuses_heads_that_no_side_of_the_benchmark_sends() {
        let length = |bytes: &[u8]| Partial::default().request(bytes, |it| content_length(it.headers));
        assert!(length(b"GET / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
        assert!(length(b"GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n").is_err());
        assert!(length(b"\x82\x05Hello\r\n\r\n").is_err());
        assert!(length(&[b'a'; MAX_BYTES]).is_err());
    }
}
