//! What a spliced stream costs beside no proxy at all: bulk, message rate and latency of a direct, routed
//! connection, of the packet splice and of the relay, interleaved in one run, as ratios to direct.
//!
//! ```text
//! cargo build --release && cargo bench -p steer-tests --bench packet_splice
//! ```
//!
//! Needs root. `STEER_BENCH_ROUNDS` (15) and `STEER_BENCH_SECONDS` (1, for each measurement) set the size.

use std::net::SocketAddr;
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context as _, Result};
use steer_tests::eventually::eventually;
use steer_tests::netns::NetNs;
use steer_tests::require;
use steer_tests::socketio;
use steer_tests::steer::Steer;
use steer_tests::topology::Topology;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

/// Connections of the message-rate measurement.
const CONNECTIONS: usize = 100;
const MESSAGE: usize = 64;
const BLOCK: usize = 256 * 1024;
/// Before each measurement, so that windows are open and streams are spliced.
const WARM_UP: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    if !require::root() {
        return Ok(());
    }
    let rounds = number("STEER_BENCH_ROUNDS", 15)?;
    let span = Duration::from_secs(number("STEER_BENCH_SECONDS", 1)?);
    let topology = Topology::new(1)?;
    topology.route_directly()?;
    let endpoint = topology.endpoint_addresses(3000)[0];
    serve(&topology.endpoints[0], endpoint)?;

    let listen = |port| SocketAddr::from((Topology::PROXY, port));
    let start = |port, splice| {
        let config = socketio::config(listen(port), &[endpoint]);
        Steer::start(&config, Some(&topology.proxy), &["--splice", splice])
    };
    let packet = start(8080, "packet")?;
    let relay = start(8081, "relay")?;
    let targets = [
        ("direct", endpoint, None),
        ("packet", listen(8080), Some(&packet)),
        ("relay", listen(8081), Some(&relay)),
    ];

    let mut results: Vec<Vec<Measured>> = targets.iter().map(|_| Vec::new()).collect();
    for round in 1..=rounds {
        for (index, (name, target, steer)) in targets.iter().enumerate() {
            let measured = topology.clients.run(|| measure(*target, *steer, span))??;
            println!("round {round} {name:<7} {measured}");
            results[index].push(measured);
        }
    }
    let fallbacks = packet.metric("steer_splice_fallback_total", &[])?;
    anyhow::ensure!(fallbacks == 0.0, "{fallbacks} streams were not spliced: the numbers are of a mixture");
    println!("\nmedian of {rounds} rounds (ratio to direct of the same round)");
    println!("{:<8} {:>22} {:>26} {:>24}", "", "bulk Gbit/s", "messages/s, 100 conns", "p50 us, 1 conn");
    for ((name, ..), measured) in targets.iter().zip(&results) {
        let column = |of: fn(&Measured) -> f64| {
            let ratios = measured.iter().zip(&results[0]).map(|(it, direct)| of(it) / of(direct));
            format!("{:.1} ({:.2})", median(measured.iter().map(of)), median(ratios))
        };
        let (bulk, rate, p50) = (column(|it| it.gbit), column(|it| it.rate), column(|it| it.p50_us));
        println!("{name:<8} {bulk:>22} {rate:>26} {p50:>24}");
    }
    Ok(())
}

/// Serves for as long as the process lives, on a thread of its own.
fn serve(netns: &NetNs, address: SocketAddr) -> Result<()> {
    let listener = netns.run(|| std::net::TcpListener::bind(address))??;
    listener.set_nonblocking(true)?;
    // The sockets stay in the namespace that the listener was made in.
    thread::spawn(move || -> Result<()> {
        runtime()?.block_on(async {
            let listener = TcpListener::from_std(listener)?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(async move {
                    // The client ends every stream, however it likes.
                    let _ended = answer(stream).await;
                });
            }
        })
    });
    Ok(())
}

/// `/bulk`: sends for ever. Anything else: echoes.
async fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let head = read_head(&mut stream).await?;
    stream
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .await?;
    if head.starts_with("GET /bulk") {
        let block = vec![0; BLOCK];
        loop {
            stream.write_all(&block).await?;
        }
    }
    let mut message = [0; MESSAGE];
    loop {
        stream.read_exact(&mut message).await?;
        stream.write_all(&message).await?;
    }
}

#[derive(Debug, Clone, Copy)]
struct Measured {
    gbit: f64,
    /// Messages echoed per second, over all connections.
    rate: f64,
    p50_us: f64,
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:6.2} Gbit/s  {:8.0} messages/s  {:6.1} us", self.gbit, self.rate, self.p50_us)
    }
}

/// Must run in the clients' namespace.
fn measure(target: SocketAddr, steer: Option<&Steer<'_>>, span: Duration) -> Result<Measured> {
    runtime()?.block_on(async {
        let measured = Measured {
            gbit: bulk(target, span).await?,
            rate: rate(target, span).await?,
            p50_us: latency(target, span).await?,
        };
        if let Some(steer) = steer {
            let none_left = || Ok((steer.metric("steer_streams", &[])? == 0.0).then_some(()));
            eventually("end of the streams", Duration::from_secs(20), none_left)?;
        }
        Ok(measured)
    })
}

async fn bulk(target: SocketAddr, span: Duration) -> Result<f64> {
    let mut stream = open(target, "/bulk").await?;
    let mut block = vec![0; BLOCK];
    let warm = Instant::now();
    while warm.elapsed() < WARM_UP {
        let read = stream.read(&mut block).await?;
        anyhow::ensure!(read > 0, "the bulk stream ended");
    }
    let (begin, mut bytes) = (Instant::now(), 0);
    while begin.elapsed() < span {
        let read = stream.read(&mut block).await?;
        anyhow::ensure!(read > 0, "the bulk stream ended");
        bytes += read;
    }
    Ok(bytes as f64 * 8.0 / 1e9 / begin.elapsed().as_secs_f64())
}

async fn rate(target: SocketAddr, span: Duration) -> Result<f64> {
    let mut running = JoinSet::new();
    let begin = Instant::now();
    for _ in 0..CONNECTIONS {
        running.spawn(async move {
            let mut stream = open(target, "/echo").await?;
            let mut echoed = 0;
            while begin.elapsed() < WARM_UP + span {
                echo(&mut stream).await?;
                echoed += usize::from(begin.elapsed() > WARM_UP);
            }
            anyhow::Ok(echoed)
        });
    }
    let mut echoed = 0;
    while let Some(done) = running.join_next().await {
        echoed += done??;
    }
    Ok(echoed as f64 / span.as_secs_f64())
}

async fn latency(target: SocketAddr, span: Duration) -> Result<f64> {
    let mut stream = open(target, "/echo").await?;
    let mut taken = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < WARM_UP + span {
        let sent = Instant::now();
        echo(&mut stream).await?;
        if begin.elapsed() > WARM_UP {
            taken.push(sent.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(median(taken.into_iter()))
}

async fn echo(stream: &mut TcpStream) -> Result<()> {
    let mut message = [7; MESSAGE];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await?;
    Ok(())
}

/// An upgraded stream.
async fn open(target: SocketAddr, path: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(target).await?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {target}\r\nX-Forwarded-For: 192.0.2.1\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let head = read_head(&mut stream).await?;
    anyhow::ensure!(head.starts_with("HTTP/1.1 101 "), "no upgrade: {head}");
    Ok(stream)
}

/// Reads byte by byte, so that nothing behind the head is taken.
async fn read_head(stream: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.context("the connection ended in a head")?);
    }
    Ok(String::from_utf8(head)?)
}

fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn number<T: std::str::FromStr>(variable: &str, default: T) -> Result<T> {
    match env::var(variable) {
        Ok(text) => text.parse().ok().with_context(|| format!("{variable}={text} is no number")),
        Err(_unset) => Ok(default),
    }
}
