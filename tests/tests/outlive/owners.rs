//! Which process owns an instance, and what happens to damaged pins.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData};
use proxy_common::abi;
use proxy_common::about::About;
use steer_tests::eventually::eventually;
use steer_tests::require;
use steer_tests::steer::Attach;
use steer_tests::topology::Topology;

use crate::bed::{Bed, HANG, config};
use crate::clsact::with_endpoint;
use crate::leaving::{expect_spliced, open};

/// The log of a `steer run` of this instance that fails to start.
fn refused(bed: &Bed<'_>, splice: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("steer.yaml");
    fs::write(&file, config(&[]).replace("8080", "8081")).unwrap();
    let output: Output =
        bed.cli(&["run", "--admin", "off", "--splice", splice, "-c", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

fn map(path: &Path, name: &str) -> MapData {
    MapData::from_pin(path.join(name)).unwrap()
}

fn about(path: &Path) -> Array<MapData, About> {
    Array::try_from(Map::from_map_data(map(path, abi::MAP_ABOUT)).unwrap()).unwrap()
}

#[test]
fn a_second_process_of_an_instance_says_so_and_exits() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(20, |bed, _| {
        for splice in ["packet", "auto"] {
            let said = refused(bed, splice);
            let expected = format!("(process {}) runs already", bed.steer.pid());
            assert!(said.contains(&expected) && said.contains("--instance"), "{said}");
        }
        let said = String::from_utf8(bed.cli(&["detach"]).stderr).unwrap();
        assert!(said.contains(&bed.steer.pid().to_string()) && said.contains("stop it first"), "{said}");
        assert!(bed.cli_text(&["cleanup"]).contains("kept"));
        thread::sleep(Duration::from_millis(300));
    });
}

#[test]
fn what_another_build_has_left_is_refused_and_its_streams_go_on() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(20, |bed, traffic| {
        bed.steer.stop(libc::SIGKILL).unwrap();
        let mut about = about(&bed.maps());
        let good = about.get(&0, 0).unwrap();
        for (bad, says) in [
            (About { layout: good.layout ^ 1, ..good }, "laid out as this build"),
            (About { netns: good.netns ^ 1, ..good }, "another network namespace"),
        ] {
            about.set(0, bad, 0).unwrap();
            let said = refused(bed, "auto");
            assert!(said.contains(says) && said.contains("steer cleanup"), "{said}");
            let kept = bed.cli_text(&["cleanup"]);
            assert!(kept.contains("kept") && kept.contains("--force"), "{kept}");
            assert!(!bed.cli(&["detach"]).status.success());
        }
        about.set(0, good, 0).unwrap();
        let other = bed.pins().join("abi1");
        fs::create_dir(&other).unwrap();
        let said = refused(bed, "auto");
        assert!(said.contains("another version"), "{said}");
        fs::remove_dir(&other).unwrap();

        let before = traffic.messages.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(500));
        assert!(traffic.messages.load(Ordering::Relaxed) > before);
        bed.steer.start_again().unwrap();
        assert_eq!(bed.rows().len(), 20);
    });
    bed.expect_no_stream();
}

#[test]
fn a_map_that_is_missing_is_refused_and_cleaned_up_by_force() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    for name in [abi::MAP_ABOUT, abi::MAP_CONNS] {
        bed.steer.stop(libc::SIGKILL).unwrap();
        fs::remove_file(bed.maps().join(name)).unwrap();
        let said = refused(&bed, "packet");
        assert!(said.contains(name) && said.contains("damaged"), "{said}");
        assert!(bed.cli_text(&["cleanup", "--force", "--dry-run"]).contains("would be removed"));
        assert!(bed.pins().exists());
        assert!(bed.cli_text(&["cleanup", "--force"]).contains("removed"));
        assert!(!bed.pins().exists());
        bed.steer.start_again().unwrap();
        bed.under_traffic(5, |_, _| {});
    }
}

#[test]
fn keys_and_records_that_do_not_fit_are_cleaned_and_the_others_go_on() {
    if !require::root() {
        return;
    }
    let topology = Topology::new(1).unwrap();
    let mut bed = Bed::start(&topology, &[]);
    bed.under_traffic(20, |bed, _| {
        bed.steer.stop(libc::SIGKILL).unwrap();
        let data = map(&bed.maps(), abi::MAP_FLOWS4);
        let mut keys: HashMap<_, [u8; 12], u32> = HashMap::try_from(Map::HashMap(data)).unwrap();
        // Keys that lead to a record that is not in use, to no record, and to the record of another
        // stream.
        for (key, flow) in [([1; 12], 60_000 << 1), ([2; 12], u32::MAX), ([3; 12], 0)] {
            keys.insert(key, flow, 0).unwrap();
        }
        // A record that is in use according to its state, but without a key.
        let data = map(&bed.maps(), abi::MAP_CONNS);
        let mut records: Array<_, [u8; 320]> = Array::try_from(Map::Array(data)).unwrap();
        let mut record = records.get(&50_000, 0).unwrap();
        record[0] = 2;
        records.set(50_000, record, 0).unwrap();

        bed.steer.start_again().unwrap();
        assert_eq!(bed.rows().len(), 20);
        assert_eq!(keys.keys().count(), 40);
        let used = || bed.metric("steer_packet_streams", &[("kind", "used")]);
        // The record is free after a grace period.
        eventually("only records in use", HANG, || Ok((used() == 20.0).then_some(()))).unwrap();
        bed.steer.restart(libc::SIGKILL).unwrap();
        assert_eq!(records.get(&50_000, 0).unwrap()[0], 0);
    });
    bed.expect_no_stream();
}

/// Usually the interfaces disappear with the namespace. Here only the interfaces do.
#[test]
fn what_is_left_of_a_namespace_that_is_gone_is_cleaned_up_from_another() {
    if !require::root() {
        return;
    }
    for attach in Attach::all() {
        let (gone, here) = (Topology::new(1).unwrap(), Topology::new(1).unwrap());
        let mut bed = Bed::start_attaching(attach, &gone, &[]);
        with_endpoint(&gone, || {
            let streams = open(&gone, 1);
            expect_spliced(&bed, 1);
            bed.steer.stop(libc::SIGKILL).unwrap();
            let cleanup = ["cleanup", "--instance", bed.steer.instance()];
            let kept = bed.cli_in(&here, &cleanup);
            assert!(kept.contains("another network namespace"), "{kept}");
            for device in ["clients", "endpoint0"] {
                gone.proxy.ip(&["link", "del", device]).unwrap();
            }
            let removed = bed.cli_in(&here, &cleanup);
            assert!(removed.contains("its network namespace is gone"), "{removed}");
            drop(streams);
        });
        assert!(!bed.pins().exists());
    }
}
