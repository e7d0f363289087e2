//! One process after another: upgrade, release, stop; what is open stays open, what waits is served.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::supervisor::{Lab, Traffic, stderr};
use crate::support::net::wait_for;

/// What `status` says of each process: its pid, and its first instance's state.
fn processes(lab: &Lab) -> Vec<(i32, String)> {
    let output = lab.ctl("status --json");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let Ok(Value::Array(all)) = serde_json::from_str(&text) else {
        return Vec::new();
    };
    let of = |one: &Value| {
        let pid = one["pid"].as_i64().expect("pid");
        let state = one["instances"][0]["state"].as_str().unwrap_or("none");
        (i32::try_from(pid).expect("a pid"), state.to_owned())
    };
    all.iter().map(of).collect()
}

fn control_sockets(lab: &Lab) -> usize {
    let run = std::fs::read_dir(lab.host.dir().join("run")).expect("runtime directory");
    let names = run.map(|entry| entry.expect("entry").file_name().into_string());
    let names = names.map(|name| name.expect("UTF-8"));
    names.filter(|name| name.ends_with(".sock")).count()
}

#[test]
fn a_session_outlives_a_release_until_the_next_process_stops() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    assert!(lab.ctl("pathway add-all").status.success());
    let mut first = lab.run("--all --keep-sessions --drain-timeout 1s");
    let main = first.pid().as_raw();
    let relaying = processes(&lab)[0].0;
    assert_ne!(relaying, main, "a child relays");
    let mut open = lab.proxied(2001, 40001).expect("relayed");

    let output = lab.ctl("release --json");
    assert!(output.status.success(), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["all"]["from"], relaying);
    assert_eq!(json["all"]["draining"], 1);
    // the main process has gone before the answer was complete: a service manager may go on at once
    assert!(first.wait(Duration::from_millis(500)).success());
    assert_eq!(processes(&lab), [(relaying, "draining".to_owned())]);
    open.echo("nobody else runs");
    for verb in ["reload", "upgrade", "release"] {
        let output = lab.ctl(verb);
        assert_eq!(output.status.code(), Some(1), "{verb}");
        assert!(
            stderr(&output).contains("nothing is running here"),
            "{verb}"
        );
    }

    let mut second = lab.run("--all --keep-sessions --drain-timeout 1s");
    let mut new = lab.proxied(2001, 40002).expect("relayed");
    let states: Vec<String> = processes(&lab)
        .into_iter()
        .map(|(_, state)| state)
        .collect();
    assert_eq!(states.len(), 2, "{states:?}");
    assert!(states.contains(&"running".to_owned()), "{states:?}");
    let conns = lab.ctl("conns");
    let conns = String::from_utf8_lossy(&conns.stdout).into_owned();
    assert!(
        conns.contains(":40001") && conns.contains(":40002"),
        "{conns}"
    );
    open.echo("next to the new process");
    new.echo("and there");

    // a stop is meant for all of it
    second.signal(Signal::SIGTERM);
    assert!(second.wait(Duration::from_secs(8)).success());
    for stream in [&mut open.stream, &mut new.stream] {
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)), "cut");
    }
    assert_eq!(processes(&lab), []);
    assert_eq!(control_sockets(&lab), 0);
}

#[test]
fn a_release_without_a_keeper_stays_in_the_foreground() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let mut running = lab.run("a --no-check");
    let mut open = lab.proxied(2001, 40001);
    // without the pathway the service's answer finds no way back
    assert!(open.is_err());
    assert!(lab.ctl("pathway add-all").status.success());
    open = lab.proxied(2001, 40002);
    let mut open = open.expect("relayed");
    assert!(lab.ctl("release a").status.success());
    // the answer goes out before the listener is closed
    let mut client_ports = 40003..;
    wait_for("it listens no more", || {
        client_ports
            .next()
            .is_some_and(|port| lab.proxied(2001, port).is_err())
    });
    open.echo("still there");
    open.close();
    assert!(running.wait(Duration::from_secs(5)).success());
}

#[test]
fn a_keeper_passes_on_signals_and_exit_codes_and_takes_its_child_along() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let output = lab.ctl("run nobody --keep-sessions");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let mut running = lab.run("a --no-check --keep-sessions");
    running.signal(Signal::SIGHUP);
    running.wait_log("INFO reloaded");
    let child = processes(&lab)[0].0;
    running.signal(Signal::SIGKILL);
    assert!(!running.wait(Duration::from_secs(5)).success());
    let gone = format!("/proc/{child}/cmdline");
    wait_for("the end of the child", || {
        std::fs::read(&gone).map_or(true, |words| words.is_empty())
    });
    // and the other way round
    let mut running = lab.run("a --no-check --keep-sessions");
    let child = nix::unistd::Pid::from_raw(processes(&lab)[0].0);
    nix::sys::signal::kill(child, Signal::SIGKILL).expect("kill");
    assert!(!running.wait(Duration::from_secs(5)).success());
}

/// What the kernel has completed belongs to a proxy that believes it is connected.
#[test]
fn connections_that_wait_to_be_accepted_are_served_at_a_stop() {
    const WAITING: u16 = 300;
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let mut running = lab.run("--all --manage-pathways --workers 2");
    running.signal(Signal::SIGSTOP);
    let waiting: Vec<TcpStream> = lab.host.enter(|| {
        (0..WAITING)
            .map(|number| {
                let mut stream = TcpStream::connect("127.0.0.1:2001").expect("connect");
                let port = 20_000 + number;
                write!(stream, "PROXY TCP4 192.0.2.7 127.0.0.1 {port} 2001\r\n").expect("write");
                stream
            })
            .collect()
    });
    running.signal(Signal::SIGTERM);
    running.signal(Signal::SIGCONT);
    for (number, mut stream) in waiting.into_iter().enumerate() {
        let limit = Some(Duration::from_secs(10));
        stream.set_read_timeout(limit).expect("time limit");
        let mut greeting = [0; 5];
        let outcome = stream.read_exact(&mut greeting);
        assert!(outcome.is_ok(), "connection {number}: {outcome:?}");
        assert_eq!(&greeting, b"9001\n");
    }
    assert!(running.wait(Duration::from_secs(10)).success());
}

#[test]
fn more_listeners_need_no_restart_and_fewer_are_not_forced() {
    let lab = Lab::new(&[9001]);
    let write = |options: &str| {
        let line = format!("a\t123\t127.0.0.1:2001\t127.0.0.1\t9001\t-{options}\n");
        lab.host.write("etc/instances.tsv", line);
    };
    let sockets = || lab.host.run("ss -Hltn sport = :2001").lines().count();
    write("");
    let _running = lab.run("--all --manage-pathways --workers 2");
    assert_eq!(sockets(), 2);
    let mut open = lab.proxied(2001, 9).expect("relayed");
    let traffic = Traffic::start(&lab, 2001);
    traffic.flows();
    write("\tlisteners=4");
    let changes = lab.reload("all");
    assert_eq!(changes["changed"], serde_json::json!(["a"]));
    assert_eq!(changes["notes"], serde_json::json!([]));
    assert_eq!(sockets(), 4);
    traffic.flows();
    write("\tlisteners=1");
    let note = lab.reload("all")["notes"][0].to_string();
    assert!(note.contains("a: keeps 4 listeners"), "{note}");
    assert_eq!(sockets(), 4);
    traffic.finish();
    open.echo("still there");
}

#[test]
fn an_upgrade_under_traffic_refuses_and_drops_nothing() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let mut first = lab.run("--all --manage-pathways");
    let mut open = lab.proxied(2001, 9).expect("relayed");
    let traffic = Traffic::start(&lab, 2001);
    traffic.flows();
    let mut pid = u64::try_from(first.pid().as_raw()).expect("pid");
    for _ in 0..2 {
        let output = lab.ctl("upgrade --json");
        assert!(output.status.success(), "{}", stderr(&output));
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(json["all"]["from"], pid);
        pid = json["all"]["to"].as_u64().expect("pid");
        traffic.flows();
        // the successor answers and the old one keeps its connection
        assert_eq!(lab.reload("all")["unchanged"], 1);
        open.echo("still there");
    }
    traffic.finish();
    open.echo("and still");
    let again = lab.ctl("run a --no-check");
    assert!(String::from_utf8_lossy(&again.stdout).contains(&format!("pid {pid}")));
    open.close();
    assert!(first.wait(Duration::from_secs(5)).success());
    // its pathways are the successor's to remove
    assert!(lab.host.ip("rule").contains("fwmark 0x7b"));
    let last = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("pid"));
    nix::sys::signal::kill(last, Signal::SIGTERM).expect("end the successor");
    wait_for("the end of the successor", || {
        nix::sys::signal::kill(last, None).is_err()
    });
    assert!(!lab.host.ip("rule").contains("fwmark"));
}

#[test]
fn an_upgrade_that_would_lose_an_instance_changes_nothing() {
    let lab = Lab::new(&[9001, 9002]);
    lab.instances(&[("a", 123, 2001, 9001), ("b", 124, 2002, 9002)]);
    assert!(lab.ctl("pathway add-all").status.success());
    let running = lab.run("--all");
    // the new process would not start b on a pathway that is gone
    assert!(lab.ctl("pathway del 124").status.success());
    let output = lab.ctl("upgrade");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("mark 124, is not in place"),
        "{}",
        stderr(&output)
    );
    assert!(lab.ctl("pathway add 124").status.success());
    assert_eq!(lab.reload("all")["unchanged"], 2);
    for (port, service) in [(2001, 9001), (2002, 9002)] {
        assert_eq!(
            lab.proxied(port, 39000 + port).expect("relayed").service,
            service
        );
    }
    drop(running);
}

#[test]
fn an_upgrade_that_fails_changes_nothing() {
    let lab = Lab::new(&[9001]);
    lab.instances(&[("a", 123, 2001, 9001)]);
    let running = lab.run("--all --manage-pathways");
    lab.host.write("etc/instances.tsv", "a 123 nonsense\n");
    let output = lab.ctl("upgrade");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("instances.tsv:1"),
        "{}",
        stderr(&output)
    );
    assert_eq!(lab.proxied(2001, 40001).expect("relayed").service, 9001);
    lab.instances(&[("a", 123, 2001, 9001)]);
    assert_eq!(lab.reload("all")["unchanged"], 1);
    drop(running);
}
