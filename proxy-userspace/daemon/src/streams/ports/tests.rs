use super::*;

const A: &str = "192.0.2.9:3000";
const B: &str = "192.0.2.10:3000";

fn address<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

fn gauge(metrics: &Metrics, endpoint: &str, kind: &str) -> i64 {
    metrics.source_ports.with_label_values(&[endpoint, kind]).get()
}

#[test]
fn each_endpoint_and_each_source_has_all_ports() {
    let metrics = Metrics::new();
    let ports = SourcePorts::new(&[2000..=2003], &metrics);
    let (one, two): (IpAddr, IpAddr) = (address("10.0.0.1"), address("10.0.0.2"));
    let mut leases = Vec::new();
    for (source, endpoint) in [(one, A), (one, B), (two, A)] {
        leases.extend((0..4).map(|_| ports.lease(source, address(endpoint)).unwrap()));
        let exhausted = ports.lease(source, address(endpoint)).unwrap_err();
        assert_eq!(exhausted.endpoint, address(endpoint));
    }
    assert_eq!((gauge(&metrics, A, "used"), gauge(&metrics, A, "limit")), (8, 8));
    assert_eq!((gauge(&metrics, B, "used"), gauge(&metrics, B, "limit")), (4, 4));
    assert_eq!(leases[0].address(), address("10.0.0.1:2000"));

    let freed = leases.swap_remove(0).address();
    assert_eq!(ports.lease(one, address(A)).unwrap().address(), freed);
    drop(leases);
    assert_eq!((gauge(&metrics, A, "used"), gauge(&metrics, B, "used")), (0, 0));
    assert_eq!(gauge(&metrics, A, "limit"), 8);
}

#[test]
fn sources_share_the_load_and_stand_in_for_each_other() {
    let metrics = Metrics::new();
    let ports = SourcePorts::new(&[2000..=2009], &metrics);
    let sources: [IpAddr; 2] = [address("10.0.0.1"), address("10.0.0.2")];
    let lease = || ports.lease_any(&sources, address(A));
    let leases: Vec<_> = (0..10).map(|_| lease().unwrap()).collect();
    let of_one = leases.iter().filter(|lease| lease.address().ip() == sources[0]).count();
    assert_eq!(of_one, 5);
    assert_eq!(gauge(&metrics, A, "limit"), 20);
    let more: Vec<_> = (0..10).map(|_| lease().unwrap()).collect();
    assert_eq!(lease().unwrap_err(), PortsExhausted { endpoint: address(A), limit: 20 });
    drop(more);
    assert!(lease().is_ok());
    assert!(ports.lease_any(&[], address(A)).is_err());
}

#[test]
fn an_address_is_the_same_in_either_form() {
    let metrics = Metrics::new();
    let ports = SourcePorts::new(&[2000..=2000], &metrics);
    let lease = ports.lease(address("::ffff:10.0.0.1"), address("[::ffff:192.0.2.9]:3000")).unwrap();
    assert_eq!(lease.address(), address("10.0.0.1:2000"));
    assert!(ports.lease(address("10.0.0.1"), address(A)).is_err());
}

#[test]
fn a_foreign_port_is_not_given_again_at_once() {
    let metrics = Metrics::new();
    let ports = SourcePorts::new(&[2000..=2001], &metrics);
    let lease = || ports.lease(address("10.0.0.1"), address(A));
    lease().unwrap().give_back_foreign();
    let other = lease().unwrap();
    assert_eq!(other.address().port(), 2001);
    assert!(lease().is_err());
    assert_eq!(gauge(&metrics, A, "used"), 1);
}

#[test]
fn a_port_of_an_earlier_process_is_leased_until_its_stream_ends() {
    let metrics = Metrics::new();
    let ports = SourcePorts::new(&[2000..=2001], &metrics);
    let lease = ports.lease_this(address("10.0.0.1:2000"), address(A)).unwrap();
    assert!(ports.lease_this(address("10.0.0.1:2000"), address(A)).is_none());
    assert!(ports.lease_this(address("10.0.0.1:3000"), address(A)).is_none());
    assert_eq!((gauge(&metrics, A, "used"), gauge(&metrics, A, "limit")), (1, 2));
    let other = ports.lease(address("10.0.0.1"), address(A)).unwrap();
    assert_eq!(other.address(), address("10.0.0.1:2001"));
    drop(lease);
    assert_eq!(gauge(&metrics, A, "used"), 1);
    assert_eq!(ports.lease(address("10.0.0.1"), address(A)).unwrap().address(), address("10.0.0.1:2000"));
}

#[test]
fn a_crowded_endpoint_is_warned_about_once_for_each_crossing() {
    let metrics = Metrics::new();
    let ports = SourcePorts::new(&[2000..=2009], &metrics);
    let lease = || ports.lease(address("10.0.0.1"), address(A)).unwrap();
    let crowded = || lock(&ports.inner.pools).budgets[&address(A)].crowded.load(Ordering::Relaxed);
    let mut leases: Vec<_> = (0..7).map(|_| lease()).collect();
    assert!(!crowded());
    leases.push(lease());
    assert!(crowded());
    leases.truncate(7);
    assert!(crowded(), "not calm yet");
    leases.truncate(6);
    assert!(!crowded());
}

#[test]
fn what_an_endpoint_accepts_is_remembered_for_all_its_streams() {
    let ports = SourcePorts::new(&[2000..=2009], &Metrics::new());
    let lease = |source| ports.lease(address(source), address(A)).unwrap();
    let one = lease("10.0.0.1");
    assert_eq!(one.endpoint_mss(), None);
    one.note_endpoint_mss(1360, 1360);
    one.note_endpoint_mss(1000, 1000);
    assert_eq!(lease("10.0.0.2").endpoint_mss(), Some(1360), "at least");
    one.note_endpoint_mss(1460, 1460);
    assert_eq!(one.endpoint_mss(), Some(1460));
    one.note_endpoint_mss(1400, 1460);
    assert_eq!(one.endpoint_mss(), Some(1400), "it has become less");
    assert_eq!(ports.lease(address("10.0.0.1"), address(B)).unwrap().endpoint_mss(), None);
}

#[test]
fn the_kernels_settings_leave_some_ports() {
    let metrics = Metrics::new();
    let local = host::ip_local_port_range().unwrap();
    if *local.start() <= 10240 && *local.end() == u16::MAX {
        return;
    }
    let ports = SourcePorts::start(None, &metrics).unwrap();
    assert!(!local.contains(&ports.lease(address("10.0.0.1"), address(A)).unwrap().address().port()));
}

#[test]
fn what_is_known_of_an_endpoint_is_forgotten_when_nothing_uses_it_for_long() {
    let metrics = Metrics::new();
    let ports = SourcePorts::new(&[2000..=2009], &metrics);
    let lease = |endpoint| ports.lease(address("10.0.0.1"), address(endpoint)).unwrap();
    let series = || metrics.render().lines().filter(|line| line.starts_with("steer_source_ports{")).count();
    let living = lease(A);
    drop(lease(B));
    assert_eq!(series(), 4);
    let forget = |after| ports.forget_unused(&mut lock(&ports.inner.pools), Instant::now() + after);
    forget(FORGET_AFTER / 2);
    assert_eq!((series(), lock(&ports.inner.pools).by_pair.len()), (4, 2));
    forget(FORGET_AFTER * 2);
    assert_eq!((series(), lock(&ports.inner.pools).by_pair.len()), (2, 1), "a stream keeps its pool");
    drop(living);
    forget(FORGET_AFTER * 2);
    assert_eq!((series(), lock(&ports.inner.pools).by_pair.len()), (0, 0));
    drop(lease(A));
    assert_eq!(gauge(&metrics, A, "limit"), 10);
}
