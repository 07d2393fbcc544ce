package main

import (
	"errors"
	"slices"
	"sync"
)

// cleaner undoes what the run has set up: servers, mounts, loop devices, files.
// Everything is registered at the moment when it comes to be, and undone in
// the opposite order: at its regular end through the returned function, or
// when the program ends for any other reason.
type cleaner struct {
	mu   sync.Mutex
	next int
	todo map[int]func() error
}

// add registers undo and returns a function that runs it once, ahead of time.
func (c *cleaner) add(undo func() error) (now func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.todo == nil {
		c.todo = map[int]func() error{}
	}
	id := c.next
	c.next++
	c.todo[id] = undo
	return func() error {
		c.mu.Lock()
		undo, ok := c.todo[id]
		delete(c.todo, id)
		c.mu.Unlock()
		if !ok {
			return nil
		}
		return undo()
	}
}

// run undoes everything that is left, latest first, and goes on after errors.
func (c *cleaner) run() error {
	c.mu.Lock()
	todo := c.todo
	c.todo = nil
	c.mu.Unlock()
	ids := make([]int, 0, len(todo))
	for id := range todo {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	var errs error
	for _, id := range slices.Backward(ids) {
		errs = errors.Join(errs, todo[id]())
	}
	return errs
}
