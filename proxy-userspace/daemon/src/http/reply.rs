//! The head that the client gets, made of the endpoint's response.

use std::time::SystemTime;

use http::HeaderValue;
use steer_policy::http1::Version;
use steer_policy::http1::body::BodyWriter;
use steer_policy::http1::fields::Spelling;
use steer_policy::http1::name::Known;
use steer_policy::http1::request::{BodyFraming, RequestHead};
use steer_policy::http1::response::ResponseHead;
use steer_policy::routing;

use super::fault::Fault;
use super::generation::ServedListener;

/// What must be known of a request when it is answered.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) version: Version,
    is_head: bool,
    pub(super) keep_alive: bool,
    idempotent: bool,
    has_body: bool,
    pub(super) expects_continue: bool,
    pub(super) reads_trailers: bool,
    /// Asks for an upgrade, and may have it. A body that was announced counts as payload of the
    /// stream.
    pub(super) upgrade: bool,
}

impl Default for Asked {
    /// Of a request that is not understood.
    fn default() -> Self {
        Self {
            version: Version::Http11,
            is_head: false,
            keep_alive: false,
            idempotent: false,
            has_body: false,
            expects_continue: false,
            reads_trailers: false,
            upgrade: false,
        }
    }
}

impl Asked {
    pub(super) fn of(head: &RequestHead<'_>) -> Self {
        let expect = head.fields.get(Known::Expect);
        Self {
            version: head.version,
            is_head: head.method == "HEAD",
            keep_alive: head.keep_alive,
            idempotent: head.is_idempotent(),
            has_body: head.body != BodyFraming::None,
            expects_continue: head.version == Version::Http11
                && expect.is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue")),
            reads_trailers: head.fields.has_token(Known::Te, b"trailers"),
            upgrade: false,
        }
    }

    /// Whether the request may be sent again, although the endpoint may have seen it.
    pub(super) fn may_repeat(&self) -> bool {
        self.idempotent && !self.has_body
    }

    pub(super) fn is_head(&self) -> bool {
        self.is_head
    }

    /// An upgrade that is not accepted ends its connection, since bytes of the stream may have been sent
    /// ahead; unless the answer offers an upgrade and the next request can only be the next head.
    fn declines(&self, head: &ResponseHead<'_>) -> bool {
        let offers_upgrade = head.fields.contains(Known::Upgrade);
        self.upgrade && head.status != 101 && (!offers_upgrade || self.has_body)
    }
}

/// A response, as it goes to the client.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: Vec<u8>,
    /// How the endpoint frames the body.
    pub(super) body: BodyFraming,
    /// How the client gets the body.
    pub(super) writer: BodyWriter,
    /// The client can tell where the body ends.
    pub(super) framed: bool,
    /// The client's connection ends with the response.
    pub(super) last: bool,
    /// The endpoint's connection can be used again after the response.
    pub(super) keeps_alive: bool,
}

impl Reply {
    /// `last`: the response is to be the connection's last one.
    ///
    /// # Errors
    /// The response does not have one meaning.
    pub(super) fn new<'b>(
        mut head: ResponseHead<'b>,
        asked: &Asked,
        listener: &'b ServedListener,
        set_cookies: &'b [HeaderValue],
        last: bool,
    ) -> Result<Self, Fault> {
        let status = head.status;
        let body = head.body(asked.is_head).map_err(|_not_http| Fault::EndpointProtocol)?;
        let keeps_alive = head.keeps_alive();
        let options = &listener.config.options;
        routing::forward_response(options, &mut head.fields);
        for cookie in set_cookies {
            head.fields.append(Known::SetCookie, cookie.as_bytes());
        }
        head.fields.set(Known::Server, listener.server_name.as_bytes());
        if !head.fields.contains(Known::Date) && status >= 200 {
            head.fields.append(Known::Date, httpdate::fmt_http_date(SystemTime::now()).into_bytes());
        }

        let unbounded = matches!(body, BodyFraming::Chunked | BodyFraming::UntilClose);
        let chunked = unbounded && asked.version == Version::Http11;
        let framed = !unbounded || chunked;
        match body {
            BodyFraming::Length(length) => {
                head.fields.set(Known::ContentLength, length.to_string().into_bytes())
            }
            BodyFraming::None if asked.is_head || !matches!(status, 100..=199 | 204 | 304) => {}
            BodyFraming::None | BodyFraming::Chunked | BodyFraming::UntilClose => {
                head.fields.remove(Known::ContentLength);
            }
        }
        if chunked {
            head.fields.append(Known::TransferEncoding, &b"chunked"[..]);
        }
        let last = last || !framed || !asked.keep_alive || asked.declines(&head);
        if status != 101 {
            match (last, asked.version) {
                (true, _) => head.fields.set(Known::Connection, &b"close"[..]),
                (false, Version::Http10) => head.fields.set(Known::Connection, &b"keep-alive"[..]),
                (false, Version::Http11) => {}
            }
        }
        let spelling = if options.preserve_case { Spelling::Preserved } else { Spelling::LowerCase };
        let mut out = Vec::with_capacity(1024);
        head.write(asked.version, spelling, &mut out);
        let writer = if chunked { BodyWriter::Chunked } else { BodyWriter::Bare };
        Ok(Self { status, head: out, body, writer, framed, last, keeps_alive })
    }
}
