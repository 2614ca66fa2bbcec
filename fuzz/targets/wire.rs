//! The messages of a takeover. Every message arrives as it was sent. Bytes that are accepted as a
//! message have the form that all versions of Steer write.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libfuzzer_sys::arbitrary::{self, Unstructured};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

use self::message::{MAX_REPEATED, Message, PROTOCOL};

// Includes only this file, because the daemon takes minutes to build.
#[path = "../../proxy-userspace/daemon/src/takeover/message.rs"]
mod message;

/// A message made from the fuzzer's bytes.
fn message(input: &mut Unstructured<'_>) -> arbitrary::Result<Message> {
    Ok(match input.arbitrary::<u8>()? % 6 {
        0 => Message::TakeOver {
            protocol: if input.arbitrary()? { PROTOCOL } else { input.arbitrary()? },
            version: input.arbitrary()?,
            netns: input.arbitrary()?,
        },
        1 => Message::Refused { why: input.arbitrary()? },
        2 => Message::Sockets { more: input.arbitrary()? },
        3 => Message::Prepared,
        4 => Message::Yours,
        _ => {
            let count = input.arbitrary::<u8>()?;
            let addresses = (0..count).map(|_| address(input)).collect::<arbitrary::Result<_>>()?;
            Message::Ready { addresses }
        }
    })
}

fn address(input: &mut Unstructured<'_>) -> arbitrary::Result<SocketAddr> {
    let ip: IpAddr = if input.arbitrary()? {
        Ipv4Addr::from_bits(input.arbitrary()?).into()
    } else {
        Ipv6Addr::from_bits(input.arbitrary()?).into()
    };
    Ok(SocketAddr::new(ip, input.arbitrary()?))
}

/// The form of a message, written out. Later versions of Steer have to read this form.
fn form(message: &Message) -> Value {
    match message {
        Message::TakeOver { protocol, version, netns } => {
            json!({ "take_over": { "protocol": protocol, "version": version, "netns": netns } })
        }
        Message::Refused { why } => json!({ "refused": { "why": why } }),
        Message::Sockets { more } => json!({ "sockets": { "more": more } }),
        Message::Prepared => json!("prepared"),
        Message::Yours => json!("yours"),
        Message::Ready { addresses } => {
            let addresses: Vec<_> = addresses.iter().map(SocketAddr::to_string).collect();
            json!({ "ready": { "addresses": addresses } })
        }
    }
}

fn round_trip(message: &Message) {
    let bytes = message.encode().expect("every message can be encoded");
    assert_eq!(Message::decode(&bytes).as_ref(), Ok(message), "{}", String::from_utf8_lossy(&bytes));
    let written: Value = serde_json::from_slice(&bytes).expect("what is written is JSON");
    assert_eq!(written, form(message), "(written, the form of all versions)");
}

/// Whether `all` contains `some`. Later versions may add fields. An address may be written in
/// several ways.
fn has(all: &Value, some: &Value) -> bool {
    match (all, some) {
        (Value::Object(all), Value::Object(some)) => {
            let within = |all: &Map<String, Value>| some.iter().all(|(key, some)| has(&all[key], some));
            some.keys().all(|key| all.contains_key(key)) && within(all)
        }
        (Value::Array(all), Value::Array(some)) => {
            all.len() == some.len() && all.iter().zip(some).all(|(all, some)| has(all, some))
        }
        (Value::String(all), Value::String(some)) => {
            all == some || all.parse::<SocketAddr>().is_ok_and(|all| all.to_string() == *some)
        }
        // serde also accepts a list of the fields' values without their names.
        (Value::Array(all), Value::Object(some)) => all.len() == some.len(),
        // serde accepts a variant without fields as a string, or as the only key of an object with
        // the value null.
        (Value::Object(all), Value::String(name)) => all.get(name) == Some(&Value::Null) && all.len() == 1,
        _ => all == some,
    }
}

fn read(bytes: &[u8]) {
    match Message::decode(bytes) {
        Ok(message) => {
            round_trip(&message);
            // The parts that the message skips may contain numbers, or a depth, that `Value` does
            // not accept.
            let Ok(all) = serde_json::from_slice::<Value>(bytes) else { return };
            assert!(has(&all, &form(&message)), "{} is read as {message:?}", String::from_utf8_lossy(bytes));
        }
        Err(said) => {
            let beginning = &bytes[..bytes.len().min(MAX_REPEATED)];
            assert_eq!(said, String::from_utf8_lossy(beginning), "(repeated, said)");
        }
    }
}

fuzz_target!(|input: &[u8]| {
    // An input that begins like JSON is read as a message. Any other input is used to make one.
    if input.first().is_some_and(|byte| b"{[\" \n".contains(byte)) {
        return read(input);
    }
    if let Ok(message) = message(&mut Unstructured::new(input)) {
        round_trip(&message);
    }
});
