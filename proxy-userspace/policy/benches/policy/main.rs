//! `cargo bench -p steer-policy`: what the decisions about one request take, each by itself.

mod head;
mod ring;
mod route;

/// What a browser sends with a poll of socket.io: Chrome 126 on Linux, through a CDN that adds the client's address.
const POLL: &[u8] = b"GET /socket.io/?EIO=4&transport=polling&t=P4HkR2a&sid=zLzvVxkAVAkPVZgVAAAC HTTP/1.1\r\n\
Host: chat.example.com\r\n\
Connection: keep-alive\r\n\
sec-ch-ua: \"Not/A)Brand\";v=\"8\", \"Chromium\";v=\"126\", \"Google Chrome\";v=\"126\"\r\n\
sec-ch-ua-mobile: ?0\r\n\
User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36\r\n\
sec-ch-ua-platform: \"Linux\"\r\n\
Accept: */*\r\n\
Sec-Fetch-Site: same-origin\r\n\
Sec-Fetch-Mode: cors\r\n\
Sec-Fetch-Dest: empty\r\n\
Referer: https://chat.example.com/rooms/42\r\n\
Accept-Encoding: gzip, deflate, br, zstd\r\n\
Accept-Language: en-GB,en;q=0.9,de;q=0.8\r\n\
Cookie: session=eyJ1c2VyIjo0MiwibmFtZSI6ImFkYSJ9; theme=dark\r\n\
x-forwarded-for: 203.0.113.7\r\n\
\r\n";

fn main() {
    divan::main();
}
