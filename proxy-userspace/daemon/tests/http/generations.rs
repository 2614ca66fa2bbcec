//! A configuration replaces another one while clients are connected.

use std::sync::Arc;

use tokio::sync::Notify;

use super::support::{Backend, Client, Setup, header, in_time, status};

async fn ask(client: &mut Client) -> (String, String) {
    client.send("GET / HTTP/1.1\r\nHost: t\r\n\r\n").await;
    client.response().await
}

/// The first word of the backend's answer: the backend's port.
fn port(body: &str) -> &str {
    body.split(' ').next().unwrap()
}

#[tokio::test]
async fn the_next_request_of_an_open_connection_goes_by_the_new_configuration() {
    let (old, new) = (Backend::echo().await, Backend::echo().await);
    let steer = Setup::new(&[old.address]).start().await;
    let mut client = steer.client().await;
    let (head, body) = ask(&mut client).await;
    assert_eq!((port(&body), header(&head, "server")), (&*old.address.port().to_string(), Some("steer")));

    let mut setup = Setup::new(&[new.address]);
    setup.options.server_name = "renamed".into();
    steer.publish(&setup);
    let (head, body) = ask(&mut client).await;
    assert_eq!((port(&body), header(&head, "server")), (&*new.address.port().to_string(), Some("renamed")));
    let (head, body) = ask(&mut steer.client().await).await;
    assert_eq!((port(&body), header(&head, "server")), (&*new.address.port().to_string(), Some("renamed")));

    // Both configurations have this endpoint, so the connection to it is kept.
    let before = new.connections();
    steer.publish(&Setup::new(&[new.address]));
    ask(&mut client).await;
    assert_eq!(new.connections(), before);
}

#[tokio::test]
async fn a_request_ends_as_it_began() {
    let (asked, answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let slow = {
        let (asked, answer) = (Arc::clone(&asked), Arc::clone(&answer));
        Backend::start(move |mut client| {
            let (asked, answer) = (Arc::clone(&asked), Arc::clone(&answer));
            async move {
                client.head().await;
                asked.notify_one();
                answer.notified().await;
                client.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nslow").await;
            }
        })
    }
    .await;
    let steer = Setup::new(&[slow.address]).start().await;
    let mut client = steer.client().await;
    client.send("GET / HTTP/1.1\r\nHost: t\r\n\r\n").await;
    in_time("the request", asked.notified()).await;
    let mut setup = Setup::new(&[]);
    setup.options.server_name = "renamed".into();
    steer.publish(&setup);
    answer.notify_one();
    let (head, body) = client.response().await;
    assert_eq!((&*body, header(&head, "server")), ("slow", Some("steer")));
    assert_eq!(status(&ask(&mut client).await.0), "503", "the new configuration has no endpoint");
}

#[tokio::test]
async fn a_listener_that_was_removed_goes_on_for_its_connections() {
    let backend = Backend::echo().await;
    let steer = Setup::new(&[backend.address]).start().await;
    let mut client = steer.client().await;
    ask(&mut client).await;
    steer.remove_listener();
    let (head, body) = ask(&mut client).await;
    assert_eq!((status(&head), port(&body)), ("200", &*backend.address.port().to_string()));
}
