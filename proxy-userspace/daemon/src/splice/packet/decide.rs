//! Decides whether a stream is spliced by packets, and how. Pure; asked once for each stream.

use std::net::SocketAddr;

use bytemuck::Zeroable as _;
use proxy_common::flow::{DirFixed, Direction, flags, output};
use proxy_common::reason::Reason;
use steer_kernel::bpf::packet::{wire_address, wire_ports};
use steer_kernel::net::host::InterfaceKind;
use steer_kernel::net::next_hop::NextHop;
use steer_kernel::tcp::tcp_info::{TIMESTAMP_BYTES, TcpOptions};

/// Facts about the whole host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Host {
    /// Whether a packet that is redirected to loopback's ingress finds its socket: by early
    /// demultiplexing, or because loopback accepts local sources and routes 127.0.0.0/8.
    pub(super) loopback_takes_redirected: bool,
}

/// One of the two connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leg {
    /// Canonical, like `local`: an IPv4-mapped address is IPv4.
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) options: TcpOptions,
    /// Used only if the connection has timestamps.
    pub(super) timestamp_offset: Result<u32, Reason>,
    /// The window that the peer offers, in bytes. 0: the window is full, or the kernel does not
    /// tell (before Linux 5.4).
    pub(super) send_window: u32,
    /// The window scale that the peer has announced; 0 without scaling.
    pub(super) send_scale: u8,
    /// The window scale that Steer has announced; 0 without scaling.
    pub(super) receive_scale: u8,
    /// The MSS that Steer has announced to the peer.
    pub(super) announced_mss: u32,
    /// The largest payload that one segment to the peer may have, options not counted.
    pub(super) send_mss: u32,
    /// The next hop from `local` towards the peer.
    pub(super) next_hop: Result<NextHop, Reason>,
    /// Connection tracking may drop what a hand-over sends.
    pub(super) conntrack_in_the_way: bool,
    /// Connection tracking has an entry, which is of no use once the stream is spliced.
    pub(super) tracked: bool,
}

/// How a stream is spliced.
#[derive(Debug)]
pub(super) struct Plan {
    /// [`flags`]
    pub(super) flags: u32,
    /// 4 or 6.
    pub(super) family: u32,
    /// By [`Direction`]. The deltas are zero: `approach` sets them.
    pub(super) flows: [DirFixed; 2],
    /// The interfaces that the peers' packets arrive on, in the same order.
    pub(super) arrive_on: [u32; 2],
    /// By [`Direction`]: the [`timestamp_offset`](steer_kernel::tcp::repair::timestamp_offset) of
    /// the connection on which the packets of the direction leave. Not used without timestamps.
    pub(super) ts_offsets: [u32; 2],
}

/// Where a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Remote,
    /// On this host, under ::1 or an address of 127.0.0.0/8.
    Loopback,
    /// On this host, under another address.
    Own,
}

/// Returns how a stream between `downstream` and `upstream` is spliced, or the first reason why it
/// is not.
pub(super) fn decide(host: &Host, downstream: &Leg, upstream: &Leg) -> Result<Plan, Reason> {
    let legs = [downstream, upstream];
    let outputs = outputs(host, legs)?;
    if legs.iter().any(|leg| leg.conntrack_in_the_way) {
        return Err(Reason::Conntrack);
    }
    let flags = option_flags(legs)?;
    // If both peers are on loopback, the interface takes segments of any size.
    if outputs != [output::IN_PLACE; 2] && !(fits(downstream, upstream) && fits(upstream, downstream)) {
        return Err(Reason::Mss);
    }
    if !(can_tell_window(downstream, upstream) && can_tell_window(upstream, downstream)) {
        return Err(Reason::Window);
    }
    let next_hops = [downstream.next_hop?, upstream.next_hop?];
    let flow = |direction: Direction| {
        let (from, to) = (direction as usize, direction.opposite() as usize);
        DirFixed {
            to_source: wire_address(legs[to].local.ip()),
            to_destination: wire_address(legs[to].peer.ip()),
            to_ports: wire_ports(legs[to].local.port(), legs[to].peer.port()),
            ifindex: next_hops[to].ifindex,
            output: outputs[from],
            window_left: legs[from].send_scale,
            window_right: legs[to].receive_scale,
            ..DirFixed::zeroed()
        }
    };
    Ok(Plan {
        flags,
        family: if downstream.peer.is_ipv4() { 4 } else { 6 },
        flows: Direction::BOTH.map(flow),
        arrive_on: [next_hops[0].ifindex, next_hops[1].ifindex],
        ts_offsets: [upstream, downstream].map(|leg| leg.timestamp_offset.unwrap_or(0)),
    })
}

/// Whether the stream would be spliced if neither connection had timestamps.
pub(super) fn would_without_timestamps(host: &Host, downstream: &Leg, upstream: &Leg) -> bool {
    let [downstream, upstream] = [downstream, upstream].map(|leg| {
        let timestamps = if leg.options.timestamps { TIMESTAMP_BYTES } else { 0 };
        let options = TcpOptions { timestamps: false, ..leg.options };
        Leg { options, send_mss: leg.send_mss + timestamps, ..*leg }
    });
    decide(host, &downstream, &upstream).is_ok()
}

/// The [`output`] of the flow *from* each peer.
fn outputs(host: &Host, [downstream, upstream]: [&Leg; 2]) -> Result<[u8; 2], Reason> {
    use Place::{Loopback, Own, Remote};
    let outputs = match (place(downstream)?, place(upstream)?) {
        (Remote, Remote) => [output::NEIGHBOUR; 2],
        (Loopback, Loopback) => [output::IN_PLACE; 2],
        (Remote, Loopback) => [output::LOOPBACK, output::NEIGHBOUR],
        (Own, Remote) => [output::NEIGHBOUR, output::LOOPBACK],
        (Loopback, Remote) | (Remote | Loopback | Own, Own) | (Own, Loopback) => {
            return Err(Reason::LocalHop);
        }
    };
    if outputs.contains(&output::LOOPBACK) && !host.loopback_takes_redirected {
        return Err(Reason::LocalHop);
    }
    if downstream.peer.is_ipv4() == upstream.peer.is_ipv4() {
        return Ok(outputs);
    }
    let [up, down] = outputs.map(|output| output::with_other_family(output).ok_or(Reason::FamiliesDiffer));
    Ok([up?, down?])
}

fn place(leg: &Leg) -> Result<Place, Reason> {
    let next_hop = leg.next_hop?;
    match (next_hop.local, next_hop.interface, leg.peer.ip()) {
        (false, InterfaceKind::Ethernet, _) => Ok(Place::Remote),
        (false, InterfaceKind::Loopback | InterfaceKind::Other, _) => Err(Reason::Interface),
        (true, _, ip) if ip.is_loopback() => Ok(Place::Loopback),
        (true, _, _) => Ok(Place::Own),
    }
}

/// The [`flags`] for the options that both connections have negotiated.
fn option_flags([downstream, upstream]: [&Leg; 2]) -> Result<u32, Reason> {
    let (down, up) = (downstream.options, upstream.options);
    let mut flags = 0;
    if down.timestamps != up.timestamps {
        return Err(Reason::TimestampsDiffer);
    }
    if down.timestamps {
        downstream.timestamp_offset.and(upstream.timestamp_offset)?;
        flags |= flags::TIMESTAMPS;
    }
    if down.sack && up.sack {
        flags |= flags::SACK;
    }
    if down.ecn != up.ecn {
        flags |= flags::STRIP_ECN;
    }
    Ok(flags)
}

/// Whether the windows of `from` can be told to the peer of `to`. The windows are rounded down to
/// whole units of that peer's connection, and at least two thirds of a window must be left.
fn can_tell_window(from: &Leg, to: &Leg) -> bool {
    const UNITS: u32 = 2;
    let rounded = to.receive_scale > from.send_scale;
    !rounded || from.send_window == 0 || from.send_window >> to.receive_scale >= UNITS
}

/// Whether `to` accepts the largest segments that `from` may send.
fn fits(from: &Leg, to: &Leg) -> bool {
    let timestamps = if to.options.timestamps { TIMESTAMP_BYTES } else { 0 };
    to.send_mss + timestamps >= from.announced_mss
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH0: u32 = 2;
    const ETH1: u32 = 3;
    const LO: u32 = 1;

    fn leg(peer: &str, local: &str, ifindex: u32) -> Leg {
        let peer: SocketAddr = peer.parse().unwrap();
        let local: SocketAddr = local.parse().unwrap();
        let interface = if ifindex == LO { InterfaceKind::Loopback } else { InterfaceKind::Ethernet };
        Leg {
            peer,
            local,
            options: TcpOptions { timestamps: true, sack: true, window_scale: true, ecn: false },
            timestamp_offset: Ok(ifindex * 1000),
            send_window: 64 * 1024,
            send_scale: 7,
            receive_scale: 9,
            announced_mss: 1460,
            send_mss: 1448,
            next_hop: Ok(NextHop { ifindex, interface, local: ifindex == LO }),
            conntrack_in_the_way: false,
            tracked: false,
        }
    }

    const HOST: Host = Host { loopback_takes_redirected: true };

    fn client() -> Leg {
        leg("192.0.2.1:5000", "192.0.2.9:80", ETH0)
    }

    fn endpoint() -> Leg {
        leg("198.51.100.2:3000", "198.51.100.1:20000", ETH1)
    }

    #[test]
    fn a_stream_between_two_remote_peers_is_rewritten_and_redirected() {
        let endpoint = Leg { send_scale: 4, receive_scale: 10, ..endpoint() };
        let plan = decide(&HOST, &client(), &endpoint).unwrap();
        assert_eq!((plan.flags, plan.family), (flags::TIMESTAMPS | flags::SACK, 4));
        assert_eq!(plan.arrive_on, [ETH0, ETH1]);
        let [up, down] = plan.flows;
        assert_eq!((up.output, up.ifindex), (output::NEIGHBOUR, ETH1));
        assert_eq!((down.output, down.ifindex), (output::NEIGHBOUR, ETH0));
        assert_eq!((up.window_left, up.window_right), (7, 10));
        assert_eq!((down.window_left, down.window_right), (4, 9));
        // Each offset is that of the connection on which the packets leave.
        assert_eq!(plan.ts_offsets, [3000, 2000]);
        assert_eq!(up.to_source[0], u32::from_ne_bytes([198, 51, 100, 1]));
        assert_eq!(up.to_destination[0], u32::from_ne_bytes([198, 51, 100, 2]));
        assert_eq!(up.to_ports.to_ne_bytes(), [0x4e, 0x20, 0x0b, 0xb8]);
        assert_eq!(down.to_destination[0], u32::from_ne_bytes([192, 0, 2, 1]));
        assert_eq!(down.to_ports.to_ne_bytes(), [0, 80, 0x13, 0x88]);
    }

    #[test]
    fn differences_that_can_be_translated_are() {
        let without = |change: fn(&mut Leg)| {
            let mut endpoint = endpoint();
            change(&mut endpoint);
            decide(&HOST, &client(), &endpoint).map(|plan| plan.flags)
        };
        let all = flags::TIMESTAMPS | flags::SACK;
        assert_eq!(without(|leg| leg.options.sack = false), Ok(flags::TIMESTAMPS));
        assert_eq!(without(|leg| leg.options.ecn = true), Ok(all | flags::STRIP_ECN));
        assert_eq!(without(|leg| leg.options.window_scale = false), Ok(all));
        assert_eq!(without(|leg| leg.send_window = 1024), Ok(all));
        assert_eq!(without(|leg| (leg.send_window, leg.send_scale) = (512, 9)), Ok(all));
    }

    #[test]
    fn every_reason_to_refuse_has_its_name() {
        type Change = fn(&mut Host, &mut Leg, &mut Leg);
        let cases: &[(Change, Reason)] = &[
            (|_, _, up| up.next_hop = Err(Reason::NoRoute), Reason::NoRoute),
            (
                |_, down, _| {
                    let interface = InterfaceKind::Other;
                    down.next_hop = Ok(NextHop { ifindex: ETH0, interface, local: false });
                },
                Reason::Interface,
            ),
            (|_, _, up| up.conntrack_in_the_way = true, Reason::Conntrack),
            (|_, down, _| down.options.timestamps = false, Reason::TimestampsDiffer),
            (
                |_, down, _| down.timestamp_offset = Err(Reason::MicrosecondTimestamps),
                Reason::MicrosecondTimestamps,
            ),
            (|_, down, _| down.send_mss = 1388, Reason::Mss),
            (|_, _, up| up.send_mss = 1388, Reason::Mss),
            (|_, down, _| down.announced_mss = 8960, Reason::Mss),
            (|_, _, up| up.announced_mss = 8960, Reason::Mss),
            (|_, down, _| down.send_window = 1023, Reason::Window),
            (|_, _, up| up.send_window = 1023, Reason::Window),
        ];
        for (change, reason) in cases {
            let (mut host, mut downstream, mut upstream) = (HOST, client(), endpoint());
            change(&mut host, &mut downstream, &mut upstream);
            let refused = decide(&host, &downstream, &upstream).map(|plan| plan.flags);
            assert_eq!(refused, Err(*reason), "{host:?} {downstream:?} {upstream:?}");
        }
    }

    #[test]
    fn without_timestamps_the_whole_segment_is_payload() {
        let plain = |mut leg: Leg| {
            leg.options.timestamps = false;
            leg.timestamp_offset = Err(Reason::StateUnreadable);
            leg.send_mss = 1460;
            leg
        };
        let plan = decide(&HOST, &plain(client()), &plain(endpoint())).unwrap();
        assert_eq!(plan.flags, flags::SACK);
        let smaller = Leg { send_mss: 1448, ..plain(endpoint()) };
        assert!(matches!(decide(&HOST, &plain(client()), &smaller), Err(Reason::Mss)));
    }

    #[test]
    fn a_client_loses_its_timestamps_only_if_that_is_all_that_is_in_the_way() {
        let endpoint = || {
            let mut leg = Leg { send_mss: 1460, ..endpoint() };
            leg.options.timestamps = false;
            leg
        };
        assert!(matches!(decide(&HOST, &client(), &endpoint()), Err(Reason::TimestampsDiffer)));
        assert!(would_without_timestamps(&HOST, &client(), &endpoint()));
        for other in [
            Leg { send_window: 1023, ..endpoint() },
            Leg { send_mss: 1448, ..endpoint() },
            Leg { next_hop: Err(Reason::NoRoute), ..endpoint() },
        ] {
            assert!(!would_without_timestamps(&HOST, &client(), &other));
        }
    }

    #[test]
    fn packets_between_two_families_change_their_ip_version() {
        let outputs = |down: Leg, up: Leg| {
            decide(&HOST, &down, &up).map(|plan| (plan.family, plan.flows.map(|flow| flow.output)))
        };
        let client6 = || leg("[2001:db8::9]:5000", "[2001:db8::1]:80", ETH0);
        let endpoint6 = || leg("[2001:db8::2]:3000", "[2001:db8::1]:20000", ETH1);
        assert_eq!(outputs(client6(), endpoint()), Ok((6, [output::OTHER_FAMILY; 2])));
        assert_eq!(outputs(client(), endpoint6()), Ok((4, [output::OTHER_FAMILY; 2])));
        let at_127 = leg("127.0.0.1:3000", "127.0.0.1:20000", LO);
        assert_eq!(
            outputs(client6(), at_127),
            Ok((6, [output::OTHER_FAMILY_LOOPBACK, output::OTHER_FAMILY]))
        );
        // An IPv4 client was told 1460 bytes, which an IPv6 packet of 1500 bytes does not hold.
        let endpoint6 = Leg { send_mss: 1428, announced_mss: 1440, ..endpoint6() };
        assert_eq!(outputs(client(), endpoint6), Err(Reason::Mss));
        let client = Leg { announced_mss: 1440, ..client() };
        assert!(outputs(client, endpoint6).is_ok());
    }

    #[test]
    fn local_hops_are_spliced_in_three_combinations() {
        let at_127 = || leg("127.0.0.1:3000", "127.0.0.1:20000", LO);
        let at_own = || leg("192.0.2.9:5000", "192.0.2.9:80", LO);
        let outputs = |down: Leg, up: Leg| {
            decide(&HOST, &down, &up).map(|plan| [plan.flows[0].output, plan.flows[1].output])
        };
        assert_eq!(outputs(client(), at_127()), Ok([output::LOOPBACK, output::NEIGHBOUR]));
        assert_eq!(outputs(at_own(), endpoint()), Ok([output::NEIGHBOUR, output::LOOPBACK]));
        // The MSS of loopback is larger than half a window, but does not matter on loopback.
        let large = || Leg { announced_mss: 65483, send_mss: 32741, ..at_127() };
        assert_eq!(outputs(large(), large()), Ok([output::IN_PLACE; 2]));

        for (down, up) in [(at_127(), endpoint()), (client(), at_own()), (at_own(), at_127())] {
            assert_eq!(outputs(down, up), Err(Reason::LocalHop));
        }
        let v6 = || leg("[::1]:3000", "[::1]:20000", LO);
        assert_eq!(outputs(v6(), v6()), Ok([output::IN_PLACE; 2]));
        let v6_client = leg("[2001:db8::1]:5000", "[2001:db8::9]:80", ETH0);
        assert_eq!(outputs(v6_client, v6()), Ok([output::LOOPBACK, output::NEIGHBOUR]));
        let host = Host { loopback_takes_redirected: false };
        assert!(matches!(decide(&host, &client(), &at_127()), Err(Reason::LocalHop)));
        assert!(decide(&host, &large(), &large()).is_ok());
    }
}
