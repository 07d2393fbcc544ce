package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/keeper"
)

// A server that is isolated can neither mount nor unmount, nor reach devices.
// Before it gives up its rights it starts a keeper (package keeper), which does
// the few things that place can, for one directory that was settled before. A
// server that an image has taken over can ask it for no more than that.

// What the server asks for.
type request string

const (
	askAttach request = "attach" // mount; the connection comes with the answer
	// askBacking registers the file that came with askAttach as the one that
	// is the disk.
	askBacking request = "backing"
	askProbe   request = "probe"
	askLoop    request = "loop"
	askReady   request = "ready" // the user knows of the mount
	askLeave   request = "leave"
)

type answer struct {
	Loop     string   `json:",omitempty"`
	Backing  int32    `json:",omitempty"`
	Lazy     bool     `json:",omitempty"`
	Troubles []string `json:",omitempty"`
}

// startKeeper starts a keeper for the place.
func startKeeper(p *place) (*keeper.Keeper, error) {
	return keeper.Start(p, keeper.Options{Title: p.Dir})
}

// ask asks the keeper, and waits whatever happens.
func (srv *server) ask(r request) (a answer, err error) {
	err = srv.keeper.Ask(context.Background(), r, &a)
	return a, err
}

// askAttach asks for the connection. The descriptor with, if it is not -1, is
// that of the file for askBacking.
func (srv *server) askAttach(with int) (conn int, err error) {
	return srv.keeper.AskFile(context.Background(), askAttach, nil, with)
}

// beKeeper does the keeper's work when this process is one, and reports
// whether it was.
func beKeeper() bool {
	return keeper.Be("mount-keeper", func(setup json.RawMessage) (keeper.Service, error) {
		p := new(place)
		return p, json.Unmarshal(setup, p)
	})
}

// End implements keeper.Service: the mount has gone by then. Or its server was
// killed; it is dead then, and stays for those who use it to see, unless there
// is nobody yet.
func (p *place) End() { p.abandon() }

// Serve implements keeper.Service.
func (p *place) Serve(_ context.Context, request json.RawMessage, given keeper.Given) keeper.Reply {
	var q string
	if err := json.Unmarshal(request, &q); err != nil {
		return keeper.Reply{FD: -1, Err: err}
	}
	return p.serve(q, given.FD)
}

// serve does what the server asks for. disk is the file that came with the
// request, -1 for none.
func (p *place) serve(q string, disk int) keeper.Reply {
	var a answer
	r := keeper.Reply{FD: -1}
	switch request(q) {
	case askAttach:
		r.FD, r.Err = fusefs.Attach(p.Dir, p.ReadOnly, p.options())
		if r.Err == nil {
			p.mounted()
		}
		if r.Err == nil && disk >= 0 && p.backing == nil {
			// Held on to until askBacking. Otherwise the connection must end
			// with the server.
			p.backing, r.Keep = &backing{conn: r.FD, disk: disk}, true
		}
	case askBacking:
		a.Backing, r.Err = p.registerBacking()
	case askProbe:
		r.Err = p.probe()
	case askLoop:
		a.Loop, r.Err = p.attachLoop()
	case askReady:
		p.ready = true
	case askLeave:
		var troubles []error
		a.Lazy, troubles = p.leave()
		for _, t := range troubles {
			a.Troubles = append(a.Troubles, t.Error())
		}
	default:
		r.Err = fmt.Errorf("what is %q?", q)
	}
	r.Answer = a
	return r
}
