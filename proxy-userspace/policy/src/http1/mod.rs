//! The bytes of HTTP/1.1 before a library reads them: where requests begin and end (`framing`), and
//! which heads have only one meaning (`head`).

pub mod framing;
pub mod head;
