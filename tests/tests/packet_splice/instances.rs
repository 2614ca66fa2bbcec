//! Several Steers on one host, with programs on the same interfaces.

use steer_tests::require;
use steer_tests::steer::Steer;
use steer_tests::topology::Topology;

use crate::net::{FRONT_PORT, Family, Net, Path, Setup, at_once};

/// In full flow, a hand-over needs copies of acknowledgements, which meet the programs of both
/// instances. The instance that has attached its programs first sees them first.
#[test]
fn hand_overs_in_full_flow_do_not_meet_those_of_another_instance() {
    if !require::root() {
        return;
    }
    at_once(Family::BOTH, |family| {
        let topology = Topology::new(1).unwrap();
        let setup = |ports: &str| {
            let setup = Setup::new(Path::Packet, family).with(&format!("source_ports: [{ports}]"));
            // All streams are in full flow by then.
            setup.with("hand_over_after: 1s")
        };
        let net = Net::start(&topology, setup("20000-20999"));
        let first = net.carried();
        let mut other = setup("21000-21999");
        other.front.set_port(FRONT_PORT + 1);
        let second = Steer::start(&other.config(), Some(&topology.proxy), &[]).unwrap();
        let open = |_| [net.open(), net.open_at(other.front, |_| {})];
        at_once((0..8).flat_map(open).collect::<Vec<_>>(), |mut stream| stream.bulk(128 << 20));
        let copies = |steer: &Steer<'_>, what| steer.metric("steer_packet_total", &[("what", what)]).unwrap();
        for steer in [&net.steer, &second] {
            let (made, passed) = (copies(steer, "copied"), copies(steer, "copy_passed"));
            let late = copies(steer, "drop_late_copy");
            assert!(made > 0.0, "no hand-over was in full flow");
            assert_eq!(made, passed + late);
        }
        drop(first);
    });
}
