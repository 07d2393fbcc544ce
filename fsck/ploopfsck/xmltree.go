package ploopfsck

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Bounds of a descriptor, those of layers/ploop.
const (
	maxDescriptor = 1 << 20
	maxNodes      = 64 << 10
	maxNesting    = 32
)

// node is an element of the document, with its place in it, so that an edit
// leaves everything else as it is, byte for byte: comments, unknown elements,
// the order and the white space.
type node struct {
	name       string
	text       strings.Builder
	up         *node
	sub        []*node
	start, end int // of the whole element
	from, to   int // of its content; from == end of the tag for <a/>
}

// all are the children of a name, one the first of them.
func (n *node) all(name string) (out []*node) {
	for _, s := range n.sub {
		if s.name == name {
			out = append(out, s)
		}
	}
	return out
}

func (n *node) one(name string) *node {
	for _, s := range n.sub {
		if s.name == name {
			return s
		}
	}
	return nil
}

// value is the text of a child, "" without it.
func (n *node) value(name string) string {
	if s := n.one(name); s != nil {
		return strings.TrimSpace(s.text.String())
	}
	return ""
}

// parseXML builds a tree of bounded size.
func parseXML(b []byte) (*node, error) {
	if len(b) > maxDescriptor {
		return nil, fmt.Errorf("larger than %d bytes", maxDescriptor)
	}
	dec := xml.NewDecoder(bytes.NewReader(b))
	top := &node{}
	open := []*node{top}
	for nodes := 0; ; nodes++ {
		before := int(dec.InputOffset())
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if nodes > maxNodes || len(open) > maxNesting {
			return nil, errors.New("too many or too deeply nested elements")
		}
		at := open[len(open)-1]
		switch e := tok.(type) {
		case xml.StartElement:
			if nodes += len(e.Attr); nodes > maxNodes {
				return nil, errors.New("too many attributes")
			}
			n := &node{name: e.Name.Local, up: at, start: before, from: int(dec.InputOffset())}
			at.sub = append(at.sub, n)
			open = append(open, n)
		case xml.EndElement:
			at.to, at.end = before, int(dec.InputOffset())
			open = open[:len(open)-1]
		case xml.CharData:
			at.text.Write(e)
		}
	}
	if len(top.sub) == 0 {
		return nil, errors.New("no root element")
	}
	return top.sub[0], nil
}

// edit replaces the bytes [from, to) of the document.
type edit struct {
	from, to int
	text     string
}

func escaped(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}

// setText gives the child of that name a text; a child that is not there comes
// behind the others. nil when neither can be done.
func setText(b []byte, parent *node, name, value string) []edit {
	n := parent.one(name)
	if n == nil {
		return addChild(b, parent, "<"+name+">"+escaped(value)+"</"+name+">")
	}
	if n.from == n.end { // <a/>
		tag := bytes.TrimSuffix(b[n.start:n.end], []byte("/>"))
		return []edit{{n.start, n.end, strings.TrimRight(string(tag), " \t\r\n") + ">" + escaped(value) + "</" + tagOf(tag) + ">"}}
	}
	return []edit{{n.from, n.to, escaped(value)}}
}

// tagOf is the name in a start tag as written, with its prefix.
func tagOf(tag []byte) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(string(tag), "<"), " ")
	return strings.TrimRight(name, "\t\r\n/")
}

// addChild adds an element behind the children of parent, indented as the last
// of them is. nil where parent has none.
func addChild(b []byte, parent *node, element string) []edit {
	if len(parent.sub) == 0 {
		return nil
	}
	return addBehind(b, parent.sub[len(parent.sub)-1], element)
}

// addBehind adds an element behind n, indented as n is.
func addBehind(b []byte, n *node, element string) []edit {
	return []edit{{n.end, n.end, string(b[indentOf(b, n):n.start]) + element}}
}

// remove takes n out, with the white space before it.
func remove(b []byte, n *node) []edit { return []edit{{indentOf(b, n), n.end, ""}} }

// indentOf is where the white space before n begins.
func indentOf(b []byte, n *node) int {
	at := n.start
	for at > 0 && strings.ContainsRune(" \t\r\n", rune(b[at-1])) {
		at--
	}
	return at
}

// clash reports whether an edit touches bytes of one that is planned.
func clash(planned []edit, add []edit) bool {
	for _, p := range planned {
		for _, a := range add {
			if a.from < p.to && p.from < a.to || a.from == p.from && a.from < a.to && p.from < p.to {
				return true
			}
		}
	}
	return false
}

// apply makes the edits, which do not overlap.
func apply(b []byte, edits []edit) []byte {
	slices.SortStableFunc(edits, func(x, y edit) int { return cmp.Or(cmp.Compare(x.from, y.from), cmp.Compare(x.to, y.to)) })
	var out []byte
	at := 0
	for _, e := range edits {
		out = append(append(out, b[at:e.from]...), e.text...)
		at = e.to
	}
	return append(out, b[at:]...)
}
