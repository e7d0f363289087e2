//! `mmproxy.service`, all instances in one process, under a real systemd and under traffic.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::chain::deployment::{CLIENT4, Deployment, VPS01, WKS01_PRIVATE, shipped};
use crate::support::net::wait_for;
use crate::systemd::Systemd;

const UNIT: &str = "mmproxy";

/// One connection as HAProxy makes it, and one request over it.
fn fetch(client_port: u16) -> std::io::Result<()> {
    let addr = (
        WKS01_PRIVATE
            .parse::<std::net::IpAddr>()
            .expect("an address"),
        8443,
    )
        .into();
    let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(
        stream,
        "PROXY TCP4 {CLIENT4} 192.0.2.5 {client_port} 443\r\n\
         GET / HTTP/1.1\r\nHost: wks01\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let wanted = format!("{CLIENT4} {client_port}");
    if answer.ends_with(&wanted) {
        return Ok(());
    }
    Err(std::io::Error::other(format!(
        "'{answer}' does not end with '{wanted}'"
    )))
}

/// Requests without a pause from vps01, straight to the relay: HAProxy would try again and hide a refusal.
struct Traffic {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), String>>,
}

impl Traffic {
    fn start(lab: &Deployment) -> Self {
        let (stop, served) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted, vps01) = (Arc::clone(&stop), Arc::clone(&served), lab.vps01.clone());
        let thread = std::thread::spawn(move || {
            vps01.enter(|| {
                for port in (10000..60000).cycle() {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    fetch(port).map_err(|error| format!("request from port {port}: {error}"))?;
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        });
        Self {
            stop,
            served,
            thread,
        }
    }

    fn flows(&self) {
        let before = self.served.load(Ordering::Relaxed);
        wait_for("requests to be served", || {
            self.thread.is_finished() || self.served.load(Ordering::Relaxed) > before + 20
        });
    }

    fn finish(self) {
        self.flows();
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .expect("traffic")
            .expect("every request is served");
    }
}

fn override_unit(systemd: &Systemd, text: &str) {
    systemd.run("mkdir -p /etc/systemd/system/mmproxy.service.d");
    let file = "/etc/systemd/system/mmproxy.service.d/test.conf";
    systemd.run_script(&format!("printf '[Service]\\n{text}\\n' >{file}"));
    systemd.run("systemctl daemon-reload");
}

fn override_instance(systemd: &Systemd, text: &str) {
    systemd.run("mkdir -p /etc/systemd/system/mmproxy@.service.d");
    let file = "/etc/systemd/system/mmproxy@.service.d/test.conf";
    // printf's own %
    let text = text.replace('%', "%%");
    systemd.run_script(&format!("printf '[Service]\\n{text}\\n' >{file}"));
    systemd.run("systemctl daemon-reload");
}

#[test]
fn reload_restart_and_upgrade_under_traffic() {
    let lab = Deployment::new();
    let (sshd, _web) = (lab.sshd(), lab.web_server());
    let _proxies = lab.haproxies();
    let systemd = Systemd::boot(&lab.wks01);
    let verified =
        systemd.try_run("systemd-analyze verify --man=no /etc/systemd/system/mmproxy.service");
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(verified.status.success() && said.is_empty(), "{said}");

    systemd.run("systemctl enable mmproxy-pathways mmproxy");
    systemd.run("systemctl start multi-user.target");
    systemd.wait_active(&[UNIT]);
    assert_eq!(
        systemd.show(UNIT, "StatusText"),
        "relaying 3 of 3 instances"
    );
    let status = systemd.run(&format!(
        "cat /proc/{}/status",
        systemd.show(UNIT, "MainPID")
    ));
    let uid = status
        .lines()
        .find(|line| line.starts_with("Uid:"))
        .expect("Uid");
    assert!(!uid.contains("\t0"), "{uid}");

    // an instance runs once: the other unit says so and leaves it alone
    systemd.run("systemctl start --no-block mmproxy@vps01-ssh");
    wait_for("the other unit to say who runs it", || {
        systemd
            .journal()
            .contains("vps01-ssh: already running, pid")
    });

    let traffic = Traffic::start(&lab);
    traffic.flows();

    // reload: a good one, and one with a mistake that is shown to whoever asked
    let pid = systemd.show(UNIT, "MainPID");
    systemd.run_script("sed -i '/router01-ssh/d' /etc/mmproxy/instances.tsv");
    systemd.run("systemctl reload mmproxy");
    assert_eq!(
        systemd.show(UNIT, "StatusText"),
        "relaying 2 of 2 instances"
    );
    systemd.run_script(
        "cp /etc/mmproxy/instances.tsv /tmp/good; echo nonsense >>/etc/mmproxy/instances.tsv",
    );
    assert!(!systemd.try_run("systemctl reload mmproxy").status.success());
    assert!(
        systemd.journal().contains("nonsense"),
        "{}",
        systemd.journal()
    );
    assert_eq!(systemd.show(UNIT, "ActiveState"), "active");
    assert_eq!(systemd.show(UNIT, "MainPID"), pid);
    // and one that leaves an instance down: said to whoever asked, and nothing else is the worse for it
    systemd.run_script(
        "cat /tmp/good >/etc/mmproxy/instances.tsv; \
         printf 'down\\t123\\tunix:/nowhere/down.sock\\t127.0.0.1\\t22\\t-\\n' >>/etc/mmproxy/instances.tsv",
    );
    assert!(!systemd.try_run("systemctl reload mmproxy").status.success());
    assert!(
        systemd.journal().contains("not running: down: "),
        "{}",
        systemd.journal()
    );
    assert_eq!(systemd.show(UNIT, "ActiveState"), "active");
    assert_eq!(systemd.show(UNIT, "MainPID"), pid);
    traffic.flows();
    systemd.run_script("cat /tmp/good >/etc/mmproxy/instances.tsv");
    systemd.run("systemctl reload mmproxy");

    // restart: systemd keeps the sockets, nobody is refused, and the session outlives it
    assert_ne!(systemd.show(UNIT, "NFileDescriptorStore"), "0");
    let mut session = sshd.login(&lab.client, VPS01[0], 22001, Some((CLIENT4, 44001)));
    assert_eq!(session.client, (CLIENT4.to_owned(), 44001));
    replace_program(&systemd);
    let begin = Instant::now();
    systemd.run("systemctl restart mmproxy");
    // nothing waits for the session
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    assert_ne!(systemd.show(UNIT, "MainPID"), pid);
    traffic.flows();
    session.echo("over a restart");
    let status = systemd.run("mmproxyctl status");
    assert!(
        status.contains("draining") && status.contains("running"),
        "{status}"
    );
    let conns = systemd.run(&format!("mmproxyctl conns --client {CLIENT4}:44001"));
    assert!(conns.contains("vps01-ssh"), "{conns}");

    // upgrade: the same without systemctl
    for number in 0..2 {
        let pid = systemd.show(UNIT, "MainPID");
        replace_program(&systemd);
        systemd.run("mmproxyctl upgrade all");
        wait_for("systemd to know the new main process", || {
            systemd.show(UNIT, "MainPID") != pid
        });
        session.echo(&format!("over upgrade {number}"));
        traffic.flows();
        assert_eq!(systemd.show(UNIT, "ActiveState"), "active");
        assert_eq!(systemd.show(UNIT, "NRestarts"), "0");
    }
    systemd.run("systemctl reload mmproxy");
    let executable = format!("readlink /proc/{}/exe", systemd.show(UNIT, "MainPID"));
    assert_eq!(systemd.run(&executable), "/usr/local/bin/mmproxyctl\n");
    traffic.finish();
    session.echo("to the end");

    // a stop is for the old processes, too: they have the drain time, which the session outlasts
    override_unit(
        &systemd,
        "ExecStart=\\nExecStart=mmproxyctl run --all --keep-sessions --drain-timeout 1s",
    );
    systemd.run("systemctl restart mmproxy");
    session.echo("over the last restart");
    let begin = Instant::now();
    systemd.run("systemctl stop mmproxy");
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(
        systemd.show(UNIT, "Result"),
        "success",
        "{}",
        systemd.journal()
    );
}

/// As a package manager does it: another file under the same name.
fn replace_program(systemd: &Systemd) {
    systemd
        .run_script("cp /usr/local/bin/mmproxyctl /tmp/new; mv /tmp/new /usr/local/bin/mmproxyctl");
}

/// The process that relays, beside the main one.
fn relaying(systemd: &Systemd) -> String {
    let status = systemd.run("mmproxyctl status --json");
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    status[0]["pid"].to_string()
}

#[test]
fn a_stopped_process_is_killed_by_the_watchdog() {
    let lab = Deployment::new();
    let _web = lab.web_server();
    let systemd = Systemd::boot(&lab.wks01);
    override_unit(&systemd, "WatchdogSec=1\\nRestartSec=100ms");
    systemd.run("systemctl start mmproxy");
    let pid = systemd.show(UNIT, "MainPID");
    // pings keep it alive for longer than the limit
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(systemd.show(UNIT, "MainPID"), pid, "{}", systemd.journal());
    let stuck = relaying(&systemd);
    assert_ne!(stuck, pid);
    systemd.run(&format!("kill -STOP {stuck}"));
    wait_for("the watchdog", || {
        systemd.show(UNIT, "NRestarts") == "1" && systemd.show(UNIT, "ActiveState") == "active"
    });
    assert_ne!(systemd.show(UNIT, "MainPID"), pid);
    assert_ne!(relaying(&systemd), stuck);
    lab.vps01.enter(|| fetch(40001)).expect("served again");
}

#[test]
fn a_socket_unit_starts_the_relay_of_its_name() {
    let lab = Deployment::new();
    let sshd = lab.sshd();
    let _proxies = lab.haproxies();
    let systemd = Systemd::boot(&lab.wks01);
    let unit = "mmproxy@vps01-ssh.socket";
    let example = format!("examples/socket-activation/{unit}");
    let text = std::fs::read_to_string(shipped(&example)).expect("the example");
    systemd.write(&format!("/etc/systemd/system/{unit}"), &text);
    // -v: a line for each connection that ended
    override_instance(
        &systemd,
        "ExecStart=\\nExecStart=mmproxyctl -v run %i --keep-sessions",
    );
    systemd.run(&format!("systemctl start {unit}"));
    let service = "mmproxy@vps01-ssh.service";
    assert_eq!(systemd.show(service, "ActiveState"), "inactive");

    let mut session = sshd.login(&lab.client, VPS01[0], 22001, Some((CLIENT4, 44001)));
    assert_eq!(session.client, (CLIENT4.to_owned(), 44001));
    assert_eq!(systemd.show(service, "ActiveState"), "active");
    // every worker takes part in the one socket
    let journal = systemd.journal();
    let relaying = journal
        .lines()
        .find(|line| line.contains("relaying instance"));
    let relaying = relaying.unwrap_or_else(|| panic!("{journal}"));
    let workers = relaying.split("workers=").nth(1).expect("workers");
    let workers = workers.split(' ').next().expect("a number");
    assert!(
        relaying.contains(&format!("listeners={workers}")),
        "{relaying}"
    );

    systemd.run("systemctl restart mmproxy@vps01-ssh.service");
    session.echo("over a restart");
    let other = sshd.login(&lab.client, VPS01[0], 22001, None);
    other.close();
    session.close();

    // the journal was chosen because stderr is its stream, and has each client by name
    wait_for("the end of the session in the journal", || {
        let lines = systemd.run(&format!("journalctl CLIENT={CLIENT4} --no-pager -o cat"));
        lines.contains(&format!("vps01-ssh: closed client.addr={CLIENT4}:44001"))
    });
    let lines = systemd.run("journalctl CLIENT=203.0.113.99 --no-pager -q -o cat");
    assert_eq!(lines, "");

    // a socket under a name that is no instance's is refused by name
    systemd.run(&format!("systemctl stop {unit} {service}"));
    let wrong = text.replace(
        "FileDescriptorName=vps01-ssh",
        "FileDescriptorName=vps01-shh",
    );
    systemd.write(&format!("/etc/systemd/system/{unit}"), &wrong);
    systemd.run("systemctl daemon-reload");
    systemd.run(&format!("systemctl start {unit}"));
    let _ = lab
        .vps01
        .enter(|| TcpStream::connect((WKS01_PRIVATE, 2222)));
    wait_for("the name to be said", || {
        let journal = systemd.journal();
        journal.contains("a socket whose name is no instance's") && journal.contains("vps01-shh")
    });
}
