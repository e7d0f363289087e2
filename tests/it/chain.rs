//! The whole chain with real programs: client — HAProxy or nginx — mmproxyctl — sshd and nginx. What
//! counts is what the service itself logs.

pub(crate) mod deployment;

use deployment::{CLIENT, Deployment, ROUTER01, VPS01, VPS01_PRIVATE, WKS01_PRIVATE};

const SSH: [(&str, u16); 2] = [("vps01-ssh", 2222), ("router01-ssh", 2223)];

#[test]
fn sshd_logs_the_clients_of_both_haproxies() {
    let lab = Deployment::new();
    let sshd = lab.sshd();
    let _relays = lab.mmproxyctl(&SSH);
    let _proxies = lab.haproxies();

    let mut sessions = Vec::new();
    let mut source_port = 40000;
    for (proxy, addresses) in [("vps01", VPS01), ("router01", ROUTER01)] {
        for (client, address) in CLIENT.into_iter().zip(addresses) {
            source_port += 1;
            let from = (client, source_port);
            let session = sshd.login(&lab.client, address, 22001, Some(from));
            assert_eq!(
                session.client,
                (client.to_owned(), source_port),
                "over {proxy}"
            );
            sshd.wait_login(client, source_port);
            sessions.push(session);
        }
    }
    // a client that comes without a proxy, in the midst of them
    let direct = sshd.login(&lab.vps01, WKS01_PRIVATE, 22, None);
    assert_eq!(direct.client.0, VPS01_PRIVATE);
    sessions.push(direct);

    for (number, session) in sessions.iter_mut().enumerate() {
        session.echo(&format!("session {number}, all of them open"));
    }
    sessions.into_iter().for_each(|session| session.close());
}

#[test]
fn one_client_port_over_both_proxies_at_once() {
    let lab = Deployment::new();
    let sshd = lab.sshd();
    let _relays = lab.mmproxyctl(&SSH);
    let _proxies = lab.haproxies();

    for (family, client) in CLIENT.into_iter().enumerate() {
        let login = |address| sshd.login(&lab.client, address, 22001, Some((client, 41000)));
        let mut first = login(VPS01[family]);
        let mut second = login(ROUTER01[family]);
        // the service has one local address: the pair of ends is taken, so the second keeps only its address
        assert_eq!(first.client, (client.to_owned(), 41000));
        assert_eq!(second.client.0, client);
        assert_ne!(second.client.1, 41000);
        sshd.wait_login(client, second.client.1);
        first.echo("the first is still there");
        second.echo("and so is the second");
    }
}

#[test]
fn nginx_logs_the_clients_of_haproxy() {
    let lab = Deployment::new();
    let web = lab.web_server();
    let _relays = lab.mmproxyctl(&[("vps01-web", 8443)]);
    let _proxies = lab.haproxies();

    for (number, (client, address)) in (42000..).zip(CLIENT.into_iter().zip(VPS01)) {
        assert_eq!(lab.fetch(address, number), format!("{client} {number}"));
        web.wait_logged(client, number);
    }
}

#[test]
fn both_services_see_the_clients_of_nginx_stream() {
    let lab = Deployment::new();
    let (sshd, web) = (lab.sshd(), lab.web_server());
    let _relays = lab.mmproxyctl(&[("vps01-ssh", 2222), ("vps01-web", 8443)]);
    let _proxy = lab.nginx_stream();

    for (port, (client, address)) in (43000..).zip(CLIENT.into_iter().zip(VPS01)) {
        let session = sshd.login(&lab.client, address, 22001, Some((client, port)));
        assert_eq!(session.client, (client.to_owned(), port));
        sshd.wait_login(client, port);
        session.close();

        let port = port + 100;
        assert_eq!(lab.fetch(address, port), format!("{client} {port}"));
        web.wait_logged(client, port);
    }
}
